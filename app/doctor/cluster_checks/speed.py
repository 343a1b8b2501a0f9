"""Speed of the pairs of nodes, as bench measured and judged it: what concerns one node."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.config.problems import count
from app.doctor.findings import Finding, Severity, Value, green, wrong

FAR = 0.005
"""Seconds of round trip; a data centre has less than a tenth, but Gloo's threads take 2.5 ms on a busy machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowPlace:
    """A node or path that bench calls slow (`app.bench.figures.SlowPart`)."""

    id: str
    nodes: tuple[int, ...]
    way: str
    bandwidth: float
    expected: float
    paths: int
    severe: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One direction, from or to this node."""

    source: int
    target: int
    bandwidth: float
    latency: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What bench found about one node."""

    pairs: tuple[Pair, ...] = ()
    slow: tuple[SlowPlace, ...] = ()


def read_speeds(found: Mapping[str, Any], rank: int) -> Speeds:
    """From bench's result file: what concerns the node with this rank."""
    pairs = tuple(Pair(**each) for each in found["pairs"] if rank in (each["source"], each["target"]))
    fields = SlowPlace.__dataclass_fields__
    slow = tuple(
        SlowPlace(**{name: each[name] for name in fields} | {"nodes": tuple(each["nodes"])}) for each in found["slow"]
    )
    return Speeds(pairs=pairs, slow=tuple(part for part in slow if rank in part.nodes))


def judge_speed(speeds: Speeds, rank: int, interface: str) -> Iterator[Finding]:
    """Findings for this node's row; none where it is no part of a pair."""
    for part in speeds.slow:
        yield _slow(part, rank, interface)
    for pair in speeds.pairs:
        # One of the two rows is enough.
        if pair.source < rank and 2 * pair.latency > FAR:
            yield wrong("pair-far", peer=pair.source, rtt=_micros(2 * pair.latency))
    if speeds.pairs and not speeds.slow:
        text = "at least {rate} with {peers}, round trip {rtt}"
        peers = count(len({pair.source for pair in speeds.pairs} - {rank}), "node")
        rtt = _micros(2 * max(pair.latency for pair in speeds.pairs))
        yield green("speed", text, rate=rate(min(pair.bandwidth for pair in speeds.pairs)), peers=peers, rtt=rtt)


def _slow(part: SlowPlace, rank: int, interface: str) -> Finding:
    sends = part.nodes[0] == rank
    values: dict[str, Value] = {"rate": rate(part.bandwidth), "expected": rate(part.expected), "interface": interface}
    if part.id == "slow-node":
        values["way"] = part.way.capitalize()
    elif part.id == "all-below-link":
        values["paths"] = part.paths
    else:
        share = 100 * part.bandwidth / part.expected
        values |= {"sends": sends, "peer": part.nodes[1 if sends else 0], "share": share}
    return wrong(part.id, Severity.RED if part.severe else Severity.YELLOW, **values)


def rate(bytes_per_second: float) -> str:
    bits = 8 * bytes_per_second
    return f"{bits / 1e9:.1f} Gb/s" if bits > 1e8 else f"{bits / 1e6:.1f} Mb/s"


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"
