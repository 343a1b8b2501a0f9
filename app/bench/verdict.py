"""What the figures say: which node or path is slow, and what changed since the baseline. Pure."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from app.bench.figures import PROVEN, Findings, PairSpeed, SlowPart, readable_rate, readable_size
from app.host.links import Link

SLOW = 0.5
"""A direction below this share of what the better half of the cluster reaches is slow."""
OF_LINK, OF_LINK_BY_CPU = 0.6, 0.3
"""Share of what the link promises that a direction must reach; the second for Gloo on a link that is not the limit,
since Gloo shares the CPUs with what else runs there."""
GLOO_BY_CPU = 375e6
"""Bytes per second above which differences between Gloo's paths are those of busy CPUs: 4 nodes on 2 cores that run
other work too reached 0.7 to 2.2 GB/s on equal paths."""
CHANGED = 0.25
"""Two runs on an idle network differ by less than this share."""
MANY_PATHS = 4
"""More that are below their links' rate are told in one sentence."""
BANDWIDTH_SIZE = 250_000
"""Bytes; below it the time is all latency."""

Edge = tuple[int, int]


def slow_parts(findings: Findings) -> tuple[SlowPart, ...]:
    """The nodes and paths that are slow against the others or their links; empty when all are well.

    A node is named when every direction from it (or to it) is slow, else the single path. With two nodes nothing tells
    the ends apart: the path is named.
    """
    pairs = findings.pairs
    slow = {(pair.source, pair.target): pair.bandwidth for pair in _slower_than_others(pairs, findings.backend)}
    nodes, explained = _slow_nodes(len(findings.nodes), pairs, slow)
    usual = _usual(pairs)
    paths = [
        SlowPart(id="slow-path", nodes=edge, bandwidth=bandwidth, expected=usual)
        for edge, bandwidth in sorted(slow.items())
        if edge not in explained
    ]
    rest = [pair for pair in pairs if (pair.source, pair.target) not in explained | slow.keys()]
    return (*nodes, *paths, *_below_link(rest, findings))


def _slow_nodes(count: int, pairs: Sequence[PairSpeed], slow: Mapping[Edge, float]) -> tuple[list[SlowPart], set[Edge]]:
    """The nodes all of whose directions are slow, and these directions."""
    found: list[SlowPart] = []
    explained: set[Edge] = set()
    for node in range(count) if count > 2 else ():
        out, into = _edges(node, pairs, outgoing=True), _edges(node, pairs, outgoing=False)
        for way, edges in (("sends and receives", out | into), ("sends", out), ("receives", into)):
            if edges and slow.keys() >= edges and not edges <= explained:
                rate = median(slow[edge] for edge in edges)
                found.append(
                    SlowPart(
                        id="slow-node", nodes=(node,), way=way, bandwidth=rate, expected=_usual(pairs), paths=len(edges)
                    )
                )
                explained |= edges
    return found, explained


def slow_pairs(pairs: Collection[PairSpeed], links: Sequence[Link], backend: str) -> tuple[PairSpeed, ...]:
    """The directions that are slow against the better half of all, or against what their links promise."""
    slow = {*_slower_than_others(pairs, backend), *slower_than_links(pairs, links, backend)}
    return tuple(pair for pair in pairs if pair in slow)


def _slower_than_others(pairs: Collection[PairSpeed], backend: str) -> tuple[PairSpeed, ...]:
    limit = min(SLOW * _usual(pairs), GLOO_BY_CPU if backend == "gloo" else math.inf)
    return tuple(pair for pair in pairs if pair.bandwidth < limit)


def slower_than_links(pairs: Collection[PairSpeed], links: Sequence[Link], backend: str) -> tuple[PairSpeed, ...]:
    """The directions that stay far below what both links promise; none where a link does not tell."""
    found = []
    for pair in pairs:
        promised = _promised(links, pair)
        if promised and pair.bandwidth < _least_share(backend, promised) * min(promised, PROVEN):
            found.append(pair)
    return tuple(found)


def _promised(links: Sequence[Link], pair: PairSpeed) -> float | None:
    rates = [rate for node in (pair.source, pair.target) if (rate := links[node].rate)]
    return min(rates) if len(rates) == 2 else None


def _least_share(backend: str, promised: float) -> float:
    """The share of its link that a direction must reach."""
    return OF_LINK_BY_CPU if backend == "gloo" and promised > GLOO_BY_CPU else OF_LINK


def spread(pairs: Sequence[PairSpeed]) -> str:
    """The range of all pairs in a few words."""
    rates, latencies = [pair.bandwidth for pair in pairs], [pair.latency for pair in pairs]
    return (
        f"{readable_rate(min(rates))} to {readable_rate(max(rates))}, "
        f"latency {min(latencies) * 1e6:.0f} to {max(latencies) * 1e6:.0f} us"
    )


def changes(findings: Findings, baseline: Mapping[str, float]) -> tuple[str, ...]:
    """What differs from `baseline` (see `key_figures`) by more than `CHANGED`, worse first, one sentence each.

    Of each collective the largest size that both have is compared.
    """
    found: list[tuple[bool, str]] = []
    compared: set[str] = set()
    for name, now in key_figures(findings).items():
        before, subject = baseline.get(name), name.partition(", ")[0]
        if not before or subject in compared:
            continue
        compared.add(subject)
        if abs(now / before - 1) > CHANGED:
            # Latencies are better when smaller.
            better = (now > before) != ("latency" in name)
            found.append(
                (better, f"{name}: {_value(name, now)}, baseline {_value(name, before)} ({now / before - 1:+.0%})")
            )
    return tuple(sentence for _, sentence in sorted(found))


def key_figures(findings: Findings) -> dict[str, float]:
    """The figures that a later run is compared with, bytes per second or seconds, the largest sizes first."""
    figures = {}
    large = [measure for measure in findings.measures if measure.size >= BANDWIDTH_SIZE]
    for measure in sorted(large, key=lambda measure: -measure.size):
        figures[f"{measure.collective}, bus bandwidth at {readable_size(measure.size)}"] = measure.bus_bandwidth
    for name in dict.fromkeys(measure.collective for measure in findings.measures):
        smallest = min((m for m in findings.measures if m.collective == name), key=lambda measure: measure.size)
        figures[f"{name} latency, at {readable_size(smallest.size)}"] = smallest.seconds
    for pair in findings.pairs:
        names = findings.nodes
        figures[f"{node_name(names, pair.source)} to {node_name(names, pair.target)}"] = pair.bandwidth
    return figures


def of_link(rate: float, findings: Findings, nodes: Iterable[int] = ()) -> float | None:
    """`rate` as a share of the slowest link of `nodes` (all, if none are given); None when a rate is unknown."""
    if len(findings.nodes) < 2:
        return None
    chosen = [findings.links[node].rate for node in nodes] or [link.rate for link in findings.links]
    rates = [link for link in chosen if link]
    return rate / min(rates) if len(rates) == len(chosen) else None


def is_good(findings: Findings) -> bool:
    """Whether these figures may serve as a baseline: all results right, nothing slow."""
    return all(measure.correct for measure in findings.measures) and not slow_parts(findings)


def _usual(pairs: Collection[PairSpeed]) -> float:
    # One slow node of four touches half of all pairs, so the plain median would be spoilt by it.
    rates = sorted(pair.bandwidth for pair in pairs)
    return median(rates[len(rates) // 2 :]) if rates else 0.0


def _edges(node: int, pairs: Sequence[PairSpeed], *, outgoing: bool) -> set[Edge]:
    return {(pair.source, pair.target) for pair in pairs if (pair.source if outgoing else pair.target) == node}


def _below_link(rest: Sequence[PairSpeed], findings: Findings) -> tuple[SlowPart, ...]:
    """Each direction, or all of them as one where they are many: then no single cable is to blame."""
    slow = slower_than_links(rest, findings.links, findings.backend)
    parts = [
        SlowPart(
            id="below-link",
            nodes=(pair.source, pair.target),
            bandwidth=pair.bandwidth,
            expected=_promised(findings.links, pair) or 0.0,
        )
        for pair in sorted(slow, key=lambda pair: pair.bandwidth)
    ]
    if len(parts) <= MANY_PATHS:
        return tuple(parts)
    nodes = tuple(dict.fromkeys(node for part in parts for node in part.nodes))
    return (replace(parts[0], id="all-below-link", nodes=nodes, paths=len(parts)),)


def _value(name: str, value: float) -> str:
    return f"{value * 1e6:.0f} us" if "latency" in name else readable_rate(value)


def node_name(names: Sequence[str], node: int) -> str:
    return f"node {node} ({names[node]})"
