"""What it costs per step to be operable: agreement to stop, metrics and records, a checkpoint every 50 steps.

    python benchmarks/train_operability.py

Blocks of 50 steps with and without all of it alternate within one run of two ranks, so that the machine's load and the
start meet both alike. CPU time of all threads of both ranks; the background write of the checkpoint is waited for.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/train_operability.md"
BLOCK, PAIRS = 50, 8


def main() -> None:
    """As torchrun's parent: starts the ranks. As a rank: measures."""
    if "LOCAL_RANK" in os.environ:
        measure()
        return
    with tempfile.TemporaryDirectory() as run_dir:
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RUN_DIR": run_dir}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        subprocess.run(command, env=environ, check=True)


def measure() -> None:
    """Times alternating blocks on this rank; rank 0 writes the result."""
    import torch
    import torch.distributed as dist

    from app.train.loop import Run
    from app.train.settings import leave, read_settings

    settings = read_settings([], os.environ)
    run = Run(settings)
    costs: dict[bool, list[float]] = {True: [], False: []}
    for block in range(2 * PAIRS + 1):
        operable = block % 2 == 1
        began = time.process_time()
        for number in range(1, BLOCK + 1):
            run.take_step()
            if operable:
                run.agreed_signal()
                if number % settings.log_every == 0:
                    run.metrics.report(run.step)
                if number == BLOCK:
                    run.checkpoints.save(run.state(), run.step)
                run.checkpoints.poll()
        run.checkpoints.wait()
        total = torch.tensor(time.process_time() - began, dtype=torch.float64)
        dist.all_reduce(total)
        if block:
            costs[operable].append(float(total) / BLOCK * 1000)
    if dist.get_rank() == 0:
        write(costs)
    leave(0)


def write(costs: dict[bool, list[float]]) -> None:
    """Prints and writes the result; `costs` are CPU ms per step of both ranks, by block, with and without."""
    ratios = [with_it / without for with_it, without in zip(costs[True], costs[False], strict=True)]
    text = f"""# Cost of being operable

Made by `benchmarks/train_operability.py` on {platform.machine()}, {os.cpu_count()} cores, Python
{platform.python_version()}: {PAIRS} pairs of {BLOCK} steps, 2 ranks, default model.

| | CPU ms per step, both ranks, median | best block |
|---|---|---|
| with stop agreement, metrics, a checkpoint every {BLOCK} steps | {shown(costs[True])} |
| the same loop without | {shown(costs[False])} |

Median of the pairs' ratios: {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f}).
"""
    print(text, flush=True)
    RESULTS.write_text(text)


def shown(times: list[float]) -> str:
    """Median and best, as two cells."""
    return f"{statistics.median(times):.1f} | {min(times):.1f}"


if __name__ == "__main__":
    main()
