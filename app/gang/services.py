"""What a participant needs of its node, so that the gang knows neither torchrun nor the machine."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from app.engine.outcome import Explanation, Failure, Outcome, Stall
from app.gang.connection import Connection, Message, ProtocolError
from app.gang.messages import JobEvent, Say


class Engine(Protocol):
    """A running torchrun, as far as the gang cares (app.engine.torchrun.Torchrun)."""

    async def watch(self, failing: Callable[[], None]) -> Outcome: ...

    async def end(self, *, gently: bool, grace: float) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundAssignment:
    """This node's place in a round."""

    round: int
    run_id: str
    node_rank: int
    nnodes: int


Answer = Callable[[str, Message], Awaitable[Mapping[str, object]]]
"""Answers one question of the coordinator with what goes into a line of JSON. Raises ProtocolError for a question it
does not know."""


async def _nothing() -> None:
    """There is nothing to do."""


async def _no_stalls() -> Sequence[Stall]:
    return ()


async def _no_explanation(_run_id: str, failure: Failure) -> Explanation:
    return Explanation(words=failure.text)


async def _no_answer(question: str, _fields: Message) -> Mapping[str, object]:
    raise ProtocolError(f"unknown question {question!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeServices:
    """What a participant needs of its node."""

    dial: Callable[[], Awaitable[Connection]]
    """Connects to node 0. Raises OSError."""
    say: Say
    holder: Callable[[int], str] = lambda _port: ""
    """Who listens on a TCP port of this machine, for people; "" for nobody."""
    answer: Answer = _no_answer
    launch: Callable[[RoundAssignment], Engine] | None = None
    """None for a job without rounds, as doctor's."""
    clean: Callable[[], int] = lambda: 0
    """Ends whatever torchrun left behind; returns how many processes that were."""
    released: Callable[[], Awaitable[None]] = _nothing
    """Returns once the machine has back what torchrun's processes used, or will not have it soon."""
    progress: Callable[[], str] = lambda: ""
    """A text that changes with every checkpoint, as it was a moment ago."""
    stalls: Callable[[], Sequence[Stall]] = lambda: ()
    """All ranks of this node, if none of them made progress a moment ago."""
    refresh: Callable[[], Awaitable[None]] = _nothing
    """Brings `progress` and `stalls` up to date, if the file system answers soon."""
    ended: Callable[[], Awaitable[Sequence[Stall]]] = _no_stalls
    """The same as `stalls`, read now: whose ranks have all ended by themselves."""
    explain: Callable[[str, Failure], Awaitable[Explanation]] = _no_explanation
    """Reads what a worker of the run has left, if the file system answers soon."""
    link: Callable[[], str] = lambda: ""
    """Says that this node's own link is down; "" where it is not."""
    event: Callable[[JobEvent], None] = lambda _event: None
    """Told of what happens to the job."""
    told: Callable[[], bool] = lambda: False
    """Whether this node has told the services of NOTIFY that node 0 was lost."""
    state: Callable[[str, int], None] = lambda _state, _round: None
    """Told of every change: (waiting, running or stopping; the round)."""
