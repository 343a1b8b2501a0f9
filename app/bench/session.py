"""One run of the bench: join the ranks, measure the pairs, then the collectives, report on rank 0."""

import json
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from app.bench.collectives import CASES, GROWTH, Ranks, measure_all
from app.bench.figures import Findings
from app.bench.pairs import CHECK_STEPS, Pair, measure_pairs, rounds, schedule
from app.bench.report import as_json, publish, write
from app.host.links import Link, read_link

ARRAYS = 8
"""Arrays of the measured size that one rank may hold at a time, with room to spare."""
PAIRS_SHARE = 0.4
"""Of the time: after it no doubtful pair is measured again."""
CHECK_SECONDS = 15.0
CHECK_SIZES = {"gloo": (1 << 16, 16 << 20), "nccl": (1 << 16, 256 << 20)}
CHECK_TIMEOUT = 30.0
"""Seconds after which a rank that waits for the others gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
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
    backend, ranks = _join(max(60.0, seconds))
    facts = _exchange(backend, ranks)
    steps = schedule(len(_leaders(facts)))
    findings = _measure(backend, ranks, facts, steps, tuple(CASES), (smallest, largest), seconds)
    if ranks.rank == 0:
        publish(findings, Path(os.environ.get("RUN_DIR") or "runs/bench") / "bench")
    return _leave(findings)


def check(result: Path) -> int:
    """What doctor asks for: every pair of nodes and a few all-reduces, in some 15 seconds. The first rank of each node
    writes the figures to `result`, wrong ones too; 0."""
    backend, ranks = _join(CHECK_TIMEOUT)
    facts = _exchange(backend, ranks)
    steps = rounds(len(_leaders(facts)))[:CHECK_STEPS]
    findings = _measure(backend, ranks, facts, steps, ("all_reduce",), CHECK_SIZES[backend], CHECK_SECONDS)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        write(result, json.dumps(as_json(findings)))
    _leave(findings)
    return 0


def _measure(
    backend: str,
    ranks: Ranks,
    facts: Sequence[RankFacts],
    steps: list[list[Pair]],
    collectives: tuple[str, ...],
    wanted: tuple[int, int],
    seconds: float,
) -> Findings:
    until = time.monotonic() + seconds
    leaders = _leaders(facts)
    links = tuple(leader.link for leader in leaders)
    pairs = measure_pairs(ranks, [leader.rank for leader in leaders], links, backend, seconds * PAIRS_SHARE, steps)
    smallest, largest = wanted
    sizes = sizes_between(smallest, min(largest, *(each.largest for each in facts)))
    measures, unsupported, cut_short = measure_all(ranks, collectives, sizes, until - time.monotonic())
    return Findings(
        nodes=tuple(leader.name for leader in leaders),
        ranks=ranks.world,
        backend=backend,
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        links=links,
        pairs=pairs,
        measures=measures,
        unsupported=unsupported,
        cut_short=cut_short if sizes == sizes_between(smallest, largest) else collectives,
    )


def _leaders(facts: Sequence[RankFacts]) -> list[RankFacts]:
    """The first rank of each node."""
    return sorted((each for each in facts if each.local_rank == 0), key=lambda each: each.node)


def _leave(findings: Findings) -> int:
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(measure.correct for measure in findings.measures) else 1


def sizes_between(smallest: int, largest: int) -> tuple[int, ...]:
    """`smallest` and its multiples by `GROWTH`, up to `largest`; at least one."""
    sizes = [smallest]
    while sizes[-1] * GROWTH <= largest:
        sizes.append(sizes[-1] * GROWTH)
    return tuple(sizes)


def _join(timeout: float) -> tuple[str, Ranks]:
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("BACKEND") != "gloo":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        # Gloo carries the decisions, so that none of them waits for a GPU.
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=timeout),
        device_id=device if on_gpu else None,
    )
    return "nccl" if on_gpu else "gloo", Ranks(rank=dist.get_rank(), world=dist.get_world_size(), device=device)


def _exchange(backend: str, ranks: Ranks) -> list[RankFacts]:
    node = int(os.environ.get("GROUP_RANK", "0"))
    own = RankFacts(
        rank=ranks.rank,
        node=node,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        name=_node_name(node),
        link=read_link(os.environ, backend=backend),
        largest=_free_memory(ranks.device) // ARRAYS,
    )
    facts = [own] * ranks.world
    dist.all_gather_object(facts, own)
    return facts


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
