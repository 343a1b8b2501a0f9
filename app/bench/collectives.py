"""The collectives: each run once and its result compared with the expected one, then timed."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from app.bench.figures import Measure

GROWTH = 4
"""Each size is this many times the one before."""
TIMED_SECONDS = 0.15
MOST_CALLS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One collective at one size, ready to run."""

    run: Callable[[], object]
    output: Tensor
    expected: Tensor


def measure_all(
    ranks: Ranks, names: Sequence[str], sizes: tuple[int, ...], seconds: float
) -> tuple[tuple[Measure, ...], tuple[str, ...], tuple[str, ...]]:
    """Measures the collectives `names` at growing `sizes` (bytes), in about `seconds` in all.

    Returns the measures, the collectives that the backend does not have, and those cut short for want of time. All
    ranks return the same.
    """
    measures: list[Measure] = []
    unsupported, cut_short = [], []
    until = time.monotonic() + seconds
    for index, name in enumerate(names):
        share = agreed(until - time.monotonic()) / (len(names) - index)
        try:
            found = list(_sizes_within(name, ranks, sizes, share))
        except RuntimeError as error:
            # ProcessGroup says "Backend X does not support Y" before anything is sent, so on all ranks alike.
            if "does not support" not in str(error):
                raise
            unsupported.append(name)
            continue
        measures += found
        if len(found) < len(sizes):
            cut_short.append(name)
    return tuple(measures), tuple(unsupported), tuple(cut_short)


def agreed(value: float) -> float:
    """The largest `value` of all ranks, so that all take the same decision."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def _sizes_within(name: str, ranks: Ranks, sizes: tuple[int, ...], seconds: float) -> Iterator[Measure]:
    started = time.monotonic()
    for size in sizes:
        measure, spent = _measure(name, ranks, size)
        yield measure
        if agreed(time.monotonic() - started) + GROWTH * spent > seconds:
            return


def _measure(name: str, ranks: Ranks, size: int) -> tuple[Measure, float]:
    started = time.monotonic()
    # Whole floats, and equally many for each rank.
    count = max(1, size // (4 * ranks.world)) * ranks.world
    case = CASES[name](ranks, count)
    case.run()
    wrong = agreed(float(not torch.equal(case.output, case.expected)))
    # Sums of sums would overflow in the timed calls.
    case.output.zero_()
    first = _timed(case.run, 1, ranks.device)
    calls = max(1, min(MOST_CALLS, int(TIMED_SECONDS / first)))
    mean = _timed(case.run, calls, ranks.device)
    measure = Measure(collective=name, ranks=ranks.world, size=count * 4, seconds=mean, correct=not wrong)
    return measure, agreed(time.monotonic() - started)


def _timed(run: Callable[[], object], calls: int, device: torch.device) -> float:
    dist.barrier()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return agreed((time.perf_counter() - started) / calls)


def synchronize(device: torch.device) -> None:
    """Waits until the GPU has done what it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pattern(count: int, ranks: Ranks, plus: int) -> Tensor:
    # Small whole numbers, so that sums over ranks are exact in float32.
    return torch.arange(count, device=ranks.device, dtype=torch.float32).remainder_(61).add_(plus)


def _all_reduce(ranks: Ranks, count: int) -> Case:
    tensor = _pattern(count, ranks, ranks.rank)
    return Case(run=lambda: dist.all_reduce(tensor), output=tensor, expected=_sum_over_ranks(count, ranks))


def _sum_over_ranks(count: int, ranks: Ranks) -> Tensor:
    return _pattern(count, ranks, 0).mul_(ranks.world).add_(ranks.world * (ranks.world - 1) // 2)


def _of_torch(*names: str) -> Callable[[Tensor, Tensor], object]:
    """The first of `names` that this torch has: 2.13 has renamed collectives, and warns of the old names."""
    found: Callable[[Tensor, Tensor], object] = next(getattr(dist, name) for name in names if hasattr(dist, name))
    return found


def _all_gather(ranks: Ranks, count: int) -> Case:
    part = count // ranks.world
    own, output = _pattern(part, ranks, ranks.rank), torch.empty(count, device=ranks.device)
    expected = torch.cat([_pattern(part, ranks, other) for other in range(ranks.world)])
    all_gather = _of_torch("all_gather_single", "all_gather_into_tensor")
    return Case(run=lambda: all_gather(output, own), output=output, expected=expected)


def _reduce_scatter(ranks: Ranks, count: int) -> Case:
    own, output = _pattern(count, ranks, ranks.rank), torch.empty(count // ranks.world, device=ranks.device)
    expected = _sum_over_ranks(count, ranks).chunk(ranks.world)[ranks.rank].clone()
    reduce_scatter = _of_torch("reduce_scatter_single", "reduce_scatter_tensor")
    return Case(run=lambda: reduce_scatter(output, own), output=output, expected=expected)


def _broadcast(ranks: Ranks, count: int) -> Case:
    tensor = _pattern(count, ranks, 7 if ranks.rank == 0 else 0)
    return Case(run=lambda: dist.broadcast(tensor, 0), output=tensor, expected=_pattern(count, ranks, 7))


def _all_to_all(ranks: Ranks, count: int) -> Case:
    part = count // ranks.world
    own = torch.cat([_pattern(part, ranks, ranks.rank * 100 + other) for other in range(ranks.world)])
    expected = torch.cat([_pattern(part, ranks, other * 100 + ranks.rank) for other in range(ranks.world)])
    output = torch.empty(count, device=ranks.device)
    return Case(run=lambda: dist.all_to_all_single(output, own), output=output, expected=expected)


def _send_recv(ranks: Ranks, count: int) -> Case:
    # A ring, as sendrecv_perf: each rank sends to the next and receives from the one before.
    own, output = _pattern(count, ranks, ranks.rank), torch.empty(count, device=ranks.device)
    after, before = (ranks.rank + 1) % ranks.world, (ranks.rank - 1) % ranks.world

    def exchange() -> None:
        transfers = [dist.P2POp(dist.isend, own, after), dist.P2POp(dist.irecv, output, before)]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()

    return Case(run=exchange, output=output, expected=_pattern(count, ranks, before))


CASES: dict[str, Callable[[Ranks, int], Case]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "all_to_all": _all_to_all,
    "send_recv": _send_recv,
}
