"""What nodes say, read from the wire: every field is checked here, once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.engine.outcome import Collective, Stall
from app.gang.connection import Message, WireError, integer, items, text

MOST_RANKS = 64
"""Of one node: a line of the wire has room for their stalls."""
MOST_ENTERED = 8
"""The newest collectives of a rank; of fewer where many ranks share the line."""

Say = Callable[[str], None]
"""Prints one message on this node's terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a node says of itself when it comes."""

    rank: int
    address: str
    """Where the connection came from, which nobody can make up; "" for node 0 itself."""
    host: str
    life: str
    """Random, new for every process: tells a reconnected node from a second one with its rank."""
    ports: tuple[int, ...]
    key: str
    facts: Mapping[str, str]
    round: int
    """The last round it took part in, 0 for none: a node 0 that was restarted continues from there."""
    failures: int
    progress: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one worker (or torchrun: rank -1) died of."""

    rank: int
    exitcode: int
    text: str
    time: int
    halted: bool
    """It had been told to end before it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to the node `rank`."""

    rank: int
    kind: str
    """joined, lost, reached, failing, stalled, ended or stop."""
    why: str = ""
    code: int = 0
    report: Report | None = None
    blocked: tuple[tuple[int, int, str], ...] = ()
    """Peers that could not be reached: (rank, port, why)."""
    stalls: tuple[Stall, ...] = ()
    """All ranks of the node, if none of them moves."""


def read_hello(message: Message, address: str, nnodes: int) -> Hello:
    """Raises WireError. `address` is where the message came from."""
    told = message.get("facts")
    if not isinstance(told, dict) or len(told) > 100:
        raise WireError("facts is not an object of at most 100 entries")
    return Hello(
        rank=integer(message, "rank", 0, nnodes - 1),
        address=address,
        host=text(message, "host", 120),
        life=text(message, "life", 64),
        ports=read_ports(message),
        key=text(message, "key", 64),
        facts={str(name)[:100]: text(told, name, 40_000) for name in told},
        round=integer(message, "round", 0, 1 << 20),
        failures=integer(message, "failures", 0, 1 << 20),
        progress=text(message, "progress", 200),
    )


def read_ports(message: Message) -> tuple[int, ...]:
    return tuple(integer(item, "port", 1, 65535) for item in items(message, "ports", 4))


def read_event(message: Message, rank: int, nnodes: int) -> Event:
    """Raises WireError."""
    kind = text(message, "kind")
    if kind in ("failing", "stop"):
        return Event(rank=rank, kind=kind)
    if kind == "reached":
        failed = items(message, "failed", 4 * nnodes)
        return Event(rank=rank, kind=kind, blocked=tuple(_read_blocked(one, nnodes) for one in failed))
    if kind == "stalled":
        return Event(
            rank=rank, kind=kind, stalls=tuple(_read_stall(one) for one in items(message, "ranks", MOST_RANKS))
        )
    if kind == "ended":
        reports = [_read_report(one) for one in items(message, "failures", 1)]
        return Event(
            rank=rank, kind=kind, code=integer(message, "code", -64, 255), report=reports[0] if reports else None
        )
    raise WireError(f"unknown message {kind!r}")


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


def _read_report(message: Message) -> Report:
    return Report(
        rank=integer(message, "rank", -1, 1 << 20),
        exitcode=integer(message, "exitcode", -64, 255),
        text=text(message, "text"),
        time=integer(message, "time", 0, 1 << 40),
        halted=bool(message.get("halted")),
    )
