"""What nodes say, read from a connection: every field is checked here, once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.engine.outcome import Collective, Explanation, Stall
from app.gang.connection import Message, ProtocolError, integer, items, printable, text

MOST_RANKS = 64
"""Of one node: a line has room for their stalls."""
MOST_ENTERED = 8
"""The newest collectives of a rank; of fewer where many ranks share the line."""
MOST_FACTS = 100
LONGEST_FACT = 40_000
"""The list of all installed packages."""
LISTEN = "listen"
"""The question for the ports that a node's peers are to dial."""
LAST_ROUND = 1 << 20
LATEST = 1 << 60
"""Microseconds of a clock that began with its machine."""
YEAR_2100 = 4_102_444_800_000
"""In milliseconds: what `datetime` can show."""

Say = Callable[[str], None]
"""Prints one message on this node's terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a node says of itself when it comes."""

    rank: int
    address: str
    """Where the connection came from, which nobody can make up; "" for node 0 itself."""
    host: str
    instance_id: str
    """Random, new for every process: tells a reconnected node from a second one with its rank."""
    key: str
    """Of its ProbeListener."""
    facts: Mapping[str, str]
    round: int
    """The last round it took part in, 0 for none: a node 0 that was restarted continues from there."""
    failures: int
    progress: str
    told: bool = False
    """It has told the services of NOTIFY that node 0 was lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What one worker (or torchrun: rank -1) died of."""

    rank: int
    exitcode: int
    time: float
    """Seconds since the epoch, on the clock of its node."""
    halted: bool
    """It had been told to end before it failed."""
    found: Explanation
    alike: int = 0
    """Other ranks of the node that the same signal has ended at the same moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something that happened to the job, as every node learns it."""

    kind: str
    """started, restarting, hang, resumed, back (a node 0 that was lost), node-0-lost, node-0-found."""
    text: str
    cause: str = ""
    """Of a restart, as in `NodeFailure.kind`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to the node `rank`."""

    rank: int
    kind: str
    """joined, lost, reached, failing, stalled, ended or stop."""
    why: str = ""
    silent: bool = False
    """Lost because it was not heard any more."""
    code: int = 0
    finished: str = ""
    """All ranks of the node had ended by themselves, without a failure: after which collective."""
    report: WorkerReport | None = None
    blocked: tuple[tuple[int, int, str], ...] = ()
    """Peers that could not be reached: (rank, port, why)."""
    stalls: tuple[Stall, ...] = ()
    """All ranks of the node, if none of them moves."""


def read_hello(message: Message, address: str) -> Hello:
    """Raises ProtocolError. `address` is where the message came from."""
    return Hello(
        rank=integer(message, "rank", 0, (1 << 16) - 1),
        address=address,
        host=text(message, "host", 120),
        instance_id=text(message, "instance_id", 64),
        key=text(message, "key", 64),
        facts=read_facts(message),
        round=integer(message, "round", 0, LAST_ROUND),
        failures=integer(message, "failures", 0, LAST_ROUND),
        progress=text(message, "progress", 200),
        told=message.get("told") is True,
    )


def read_facts(message: Message) -> dict[str, str]:
    """Names and values are printable: they are shown as a table on node 0's terminal."""
    told = message.get("facts")
    if not isinstance(told, dict) or len(told) > MOST_FACTS:
        raise ProtocolError(f"facts is not an object of at most {MOST_FACTS} entries")
    return {printable(str(name)[:100]): text(told, name, LONGEST_FACT) for name in told}


def read_ports(message: Message) -> tuple[int, ...]:
    return tuple(integer(item, "port", 1, 65535) for item in items(message, "ports", 4))


def read_event(message: Message, rank: int, nnodes: int) -> Event:
    """Raises ProtocolError."""
    kind = text(message, "kind", 40)
    if kind in ("failing", "stop"):
        return Event(rank=rank, kind=kind)
    if kind == "reached":
        failed = items(message, "failed", 4 * nnodes)
        return Event(rank=rank, kind=kind, blocked=tuple(_read_blocked(one, nnodes) for one in failed))
    if kind == "stalled":
        stalls = tuple(_read_stall(one) for one in items(message, "ranks", MOST_RANKS))
        return Event(rank=rank, kind=kind, stalls=stalls)
    if kind == "ended":
        reports = [_read_report(one) for one in items(message, "failures", 1)]
        code, finished = integer(message, "code", -64, 255), text(message, "finished", 200)
        return Event(rank=rank, kind=kind, code=code, finished=finished, report=reports[0] if reports else None)
    raise ProtocolError(f"unknown message {kind!r}")


def _read_blocked(message: Message, nnodes: int) -> tuple[int, int, str]:
    rank, port = integer(message, "rank", 0, nnodes - 1), integer(message, "port", 1, 65535)
    return rank, port, text(message, "why", 200)


def _read_stall(message: Message) -> Stall:
    return Stall(
        rank=integer(message, "rank", 0, 1 << 20),
        seconds=integer(message, "seconds", 0, 1 << 30),
        at=text(message, "at"),
        entered=tuple(_read_collective(one) for one in items(message, "entered", MOST_ENTERED)),
        ended=message.get("ended") is True,
    )


def _read_collective(message: Message) -> Collective:
    return Collective(
        name=text(message, "name", 80),
        sequence=integer(message, "sequence", 0, 1 << 60),
        group=text(message, "group", 200),
        data=text(message, "data", 200),
        done=message.get("done") is True,
    )


def _read_report(message: Message) -> WorkerReport:
    return WorkerReport(
        rank=integer(message, "rank", -1, 1 << 20),
        exitcode=integer(message, "exitcode", -64, 255),
        time=integer(message, "time", 0, YEAR_2100) / 1000,
        halted=message.get("halted") is True,
        alike=integer(message, "alike", 0, 1 << 20),
        found=Explanation(
            words=text(message, "words"),
            note=text(message, "note", 100),
            place=text(message, "place"),
            cause=text(message, "cause", 1000),
            fix=text(message, "fix", 1000),
        ),
    )
