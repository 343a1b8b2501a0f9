"""Every pair of nodes by itself, both directions, so that one slow node or cable can be told from the others."""

import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from app.bench.collectives import Ranks, agreed, synchronize
from app.bench.figures import PairSpeed
from app.bench.verdict import slow_pairs
from app.host.links import Link

FIRST_MESSAGE, LARGEST_MESSAGE, GROWTH = 1 << 16, 1 << 26, 8
"""Bytes: messages grow until one takes `LONG_ENOUGH`: fast links are filled, slow ones do not take for ever."""
LONG_ENOUGH = 0.05
"""Seconds."""
REPEATS = 1
PING_PONGS = 40
SECOND_LOOKS = 2
"""A busy moment of a machine passes, a slow link stays: a pair that looks slow is measured again, the best counts."""
SEQUENTIAL_PAIRS = 28
"""Up to 8 nodes one pair after the other, since each then has the network for itself; above that in rounds."""
CHECK_STEPS = 15
"""Of a check: up to 16 nodes every pair is measured; above, each node with 15 others."""

Pair = tuple[int, int]


def schedule(nodes: int) -> list[list[Pair]]:
    """Steps of pairs that share no node; together every pair of `nodes` once."""
    pairs = [(low, high) for low in range(nodes) for high in range(low + 1, nodes)]
    return [[pair] for pair in pairs] if len(pairs) <= SEQUENTIAL_PAIRS else rounds(nodes)


def rounds(nodes: int) -> list[list[Pair]]:
    """The same in as few steps as can be."""
    # The circle method of tournaments: one place is fixed, the others turn; an odd number has one node resting.
    circle: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    steps = []
    for _ in range(len(circle) - 1):
        meetings = zip(circle[: len(circle) // 2], reversed(circle[len(circle) // 2 :]), strict=True)
        steps.append([(min(a, b), max(a, b)) for a, b in meetings if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return steps


def measure_pairs(
    ranks: Ranks, leaders: Sequence[int], links: Sequence[Link], backend: str, seconds: float, steps: list[list[Pair]]
) -> tuple[PairSpeed, ...]:
    """Both directions of the pairs of nodes in `steps`, measured between `leaders`: the first rank of each node.

    All ranks must call it; all return the same. Doubtful pairs are measured again while `seconds` are not over.
    """
    until = time.monotonic() + seconds
    best = _measure_steps(ranks, leaders, steps)
    for _ in range(SECOND_LOOKS):
        slow = slow_pairs(best.values(), links, backend)
        suspects = sorted({(min(pair.source, pair.target), max(pair.source, pair.target)) for pair in slow})
        if not suspects or agreed(time.monotonic() - until) > 0:
            break
        again = _measure_steps(ranks, leaders, [[pair] for pair in suspects])
        best |= {edge: max(best[edge], pair, key=lambda pair: pair.bandwidth) for edge, pair in again.items()}
    return tuple(best[edge] for edge in sorted(best))


def _measure_steps(ranks: Ranks, leaders: Sequence[int], steps: list[list[Pair]]) -> dict[Pair, PairSpeed]:
    """Every direction of the pairs in `steps`, by (source, target); the same on all ranks."""
    own: list[PairSpeed] = []
    for step in steps:
        for pair in step:
            if ranks.rank in (leaders[pair[0]], leaders[pair[1]]):
                own += _measure_pair(ranks, leaders, pair)
        dist.barrier()
    gathered: list[list[PairSpeed]] = [[] for _ in range(ranks.world)]
    dist.all_gather_object(gathered, own)
    return {(pair.source, pair.target): pair for some in gathered for pair in some}


def _measure_pair(ranks: Ranks, leaders: Sequence[int], pair: Pair) -> list[PairSpeed]:
    """What this rank sends, measured here; the other rank returns the other direction."""
    first = ranks.rank == leaders[pair[0]]
    peer = leaders[pair[1]] if first else leaders[pair[0]]
    latency = _latency(ranks, peer, first=first)
    rates = [_rate(ranks, peer, sending=first), _rate(ranks, peer, sending=not first)]
    source, target = pair if first else (pair[1], pair[0])
    return [PairSpeed(source=source, target=target, bandwidth=max(rates), latency=latency)]


def _latency(ranks: Ranks, peer: int, *, first: bool) -> float:
    """Half the shortest round trip: a busy machine makes single ones long."""
    token = torch.zeros(1, device=ranks.device)
    shortest = math.inf
    # The first exchange opens the connection and is not counted.
    for turn in range(PING_PONGS + 1):
        started = time.perf_counter()
        _turn(token, peer, sending=first)
        _turn(token, peer, sending=not first)
        synchronize(ranks.device)
        if turn:
            shortest = min(shortest, time.perf_counter() - started)
    return shortest / 2


def _rate(ranks: Ranks, peer: int, *, sending: bool) -> float:
    """Bytes per second to `peer`, the best of its largest messages; 0 on the receiving side."""
    best, size, left = 0.0, FIRST_MESSAGE, REPEATS
    following = torch.zeros(1, device=ranks.device)
    while size:
        seconds = _transfer(ranks, peer, size, sending=sending)
        best = max(best, size / seconds)
        if seconds < LONG_ENOUGH and size < LARGEST_MESSAGE:
            size = min(LARGEST_MESSAGE, size * GROWTH)
        elif left:
            left -= 1
        else:
            size = 0
        # The sender decides; sizes are powers of two, which a float holds exactly.
        following.fill_(size)
        _turn(following, peer, sending=sending)
        size = int(following)
    return best if sending else 0.0


def _transfer(ranks: Ranks, peer: int, size: int, *, sending: bool) -> float:
    message, token = torch.zeros(size // 4, device=ranks.device), torch.zeros(1, device=ranks.device)
    _turn(token, peer, sending=not sending)
    synchronize(ranks.device)
    started = time.perf_counter()
    _turn(message, peer, sending=sending)
    _turn(token, peer, sending=not sending)
    synchronize(ranks.device)
    return time.perf_counter() - started


def _turn(tensor: torch.Tensor, peer: int, *, sending: bool) -> None:
    if sending:
        dist.send(tensor, peer)
    else:
        dist.recv(tensor, peer)
