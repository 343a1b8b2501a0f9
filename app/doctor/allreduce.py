"""`torchrun ... -m app.doctor.allreduce`: one short all-reduce with a checked result, for doctor.

The first rank of each node writes what it found to DOCTOR_RESULT: ranks, bytes (payload of all calls), seconds and
bytes of one timed call, correct.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

SMALL = 1 << 20
LARGEST = {"cpu": 32 << 20, "cuda": 512 << 20}
SECONDS = 0.5
"""For one timed call, at most."""
CALLS = 3


def main() -> int:
    """0 when every result was right."""
    device = torch.device("cpu")
    if os.environ.get("BACKEND") == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=30), device_id=device if on_gpu else None)
    first, right = timed(SMALL, device)
    slowest = torch.tensor(first, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    # The same size on all ranks, and one that a slow link carries in time too.
    size = max(SMALL, min(LARGEST[device.type], int(SMALL * SECONDS / float(slowest)))) // SMALL * SMALL
    results = [timed(size, device) for _ in range(CALLS)]
    correct = right and all(result for _, result in results)
    if os.environ["LOCAL_RANK"] == "0":
        found = {
            "ranks": dist.get_world_size(),
            "bytes": SMALL + CALLS * size,
            "size": size,
            "seconds": min(seconds for seconds, _ in results),
            "correct": correct,
        }
        Path(os.environ["DOCTOR_RESULT"]).write_text(json.dumps(found), encoding="ascii")
    dist.barrier()
    dist.destroy_process_group()
    return 0 if correct else 1


def timed(size: int, device: torch.device) -> tuple[float, bool]:
    """Seconds of one all-reduce of `size` bytes, and whether its result is right."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tensor = torch.full((size // 4,), float(rank + 1), device=device)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, bool((tensor == world * (world + 1) / 2).all())


if __name__ == "__main__":
    sys.exit(main())
