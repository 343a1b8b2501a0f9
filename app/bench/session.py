"""One run of the bench: join the ranks, measure the pairs, then the collectives, report on rank 0."""

import os
import re
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from app.bench.collectives import CASES, GROWTH, Ranks, measure_all
from app.bench.figures import Findings
from app.bench.pairs import measure_pairs
from app.bench.report import publish
from app.host.links import Link, read_link

ARRAYS = 8
"""Arrays of the measured size that one rank may hold at a time, with room to spare."""
PAIRS_SHARE = 0.4
"""Of the time: after it no doubtful pair is measured again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What the other ranks must know of one rank."""

    rank: int
    node: int
    local_rank: int
    name: str
    link: Link
    largest: int
    """Bytes of the largest array that its memory bears."""


def run(*, seconds: float, smallest: int, largest: int) -> int:
    """Measures for about `seconds`, at sizes from `smallest` to `largest` bytes; 1 when a result was wrong, else 0.

    Rank 0 prints the table and writes it to `$RUN_DIR/bench`.
    """
    backend, ranks = _join(seconds)
    until = time.monotonic() + seconds
    seats = _seats(backend, ranks)
    leaders = sorted((seat for seat in seats if seat.local_rank == 0), key=lambda seat: seat.node)
    links = tuple(seat.link for seat in leaders)
    pairs = measure_pairs(ranks, [seat.rank for seat in leaders], links, backend, seconds * PAIRS_SHARE)
    sizes = sizes_between(smallest, min(largest, *(seat.largest for seat in seats)))
    measures, unsupported, cut_short = measure_all(ranks, sizes, until - time.monotonic())
    findings = Findings(
        nodes=tuple(seat.name for seat in leaders),
        ranks=ranks.world,
        backend=backend,
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        links=links,
        pairs=pairs,
        measures=measures,
        unsupported=unsupported,
        cut_short=cut_short if sizes == sizes_between(smallest, largest) else tuple(CASES),
    )
    if ranks.rank == 0:
        publish(findings, Path(os.environ.get("RUN_DIR") or "runs/bench") / "bench")
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(measure.correct for measure in measures) else 1


def sizes_between(smallest: int, largest: int) -> tuple[int, ...]:
    """`smallest` and its multiples by `GROWTH`, up to `largest`; at least one."""
    sizes = [smallest]
    while sizes[-1] * GROWTH <= largest:
        sizes.append(sizes[-1] * GROWTH)
    return tuple(sizes)


def _join(seconds: float) -> tuple[str, Ranks]:
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("BACKEND") != "gloo":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        # Gloo carries the decisions, so that none of them waits for a GPU.
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=max(60.0, seconds)),
        device_id=device if on_gpu else None,
    )
    return "nccl" if on_gpu else "gloo", Ranks(rank=dist.get_rank(), world=dist.get_world_size(), device=device)


def _seats(backend: str, ranks: Ranks) -> list[Seat]:
    node = int(os.environ.get("GROUP_RANK", "0"))
    own = Seat(
        rank=ranks.rank,
        node=node,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        name=_node_name(node),
        link=read_link(os.environ, backend=backend),
        largest=_free_memory(ranks.device) // ARRAYS,
    )
    seats = [own] * ranks.world
    dist.all_gather_object(seats, own)
    return seats


def _node_name(node: int) -> str:
    listed = [name for name in re.split(r"[,\s]+", os.environ.get("NODES", "")) if name]
    return listed[node] if len(listed) == int(os.environ.get("GROUP_WORLD_SIZE", "1")) else socket.gethostname()


def _free_memory(device: torch.device) -> int:
    """Bytes for this rank: of the GPU, or its share of what the host and the container's limit leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    free = [int(found[1]) << 10] if found else [1 << 30]
    try:
        limit, used = ((Path("/sys/fs/cgroup") / name).read_text() for name in ("memory.max", "memory.current"))
        free.append(int(limit) - int(used))
    except (OSError, ValueError):
        # No limit ("max"), or no cgroup v2.
        pass
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
