"""What copies in the background cost a training: `python -m benchmarks.mirror_slowdown`.

Two nodes of one rank on this machine's loopback, processors in full use, a checkpoint of 100 MB every 15 s. Runs with
CHECKPOINTS=mirror and =own alternate, and each pair gives one ratio of steps a second, since the speed of a shared
machine drifts. Beside it stands the processor time of the launchers, which no neighbour disturbs: the copies run at
the lowest priority, so that it is what they would cost a training which leaves no processor idle.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PAIRS, SECONDS = 2, 45.0
SCRIPT = """
import os, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
torch.set_num_threads(1)
weights, saved, count = torch.randn(256, 256), time.monotonic(), 0
path = os.path.join(os.environ["CHECKPOINT_DIR"], "step-{}.pt")
print("trains", flush=True)
while True:
    for _ in range(20):
        weights = (weights @ weights).clamp(-1, 1)
    dist.all_reduce(weights[:1])
    count += 1
    if dist.get_rank() == 0 and time.monotonic() > saved + 15:
        saved = time.monotonic()
        torch.save(torch.randn(25_000_000), path.format(count))
    if dist.get_rank() == 0 and count % 10 == 0:
        print("step", count, flush=True)
"""


def main() -> int:
    ratios = []
    for _ in range(PAIRS):
        (plain, idle, _), (mirrored, busy, copied) = run("own"), run("mirror")
        ratios.append(mirrored / plain)
        cost = (busy - idle) / SECONDS / (os.cpu_count() or 1)
        print(
            f"{plain:.1f} steps/s, {mirrored:.1f} while {copied / 1e6:.0f} MB were copied: {1 - ratios[-1]:+.1%}; "
            f"the launchers took {cost:.2%} of the processors more",
            flush=True,
        )
    print(f"median: training slowed by {1 - statistics.median(ratios):+.1%}")
    return 0


def run(checkpoints: str) -> tuple[float, float, int]:
    """Steps a second, seconds of processor time of both launchers, bytes that node 1 got."""
    with tempfile.TemporaryDirectory(prefix="mirror-slowdown-") as name:
        folder = Path(name)
        (folder / "script.py").write_text(SCRIPT)
        jobs = [start(folder, rank, checkpoints) for rank in (0, 1)]
        try:
            wait_for(folder / "log0", "trains")
            first, begun = steps(folder), [sum(psutil.Process(job.pid).cpu_times()[:2]) for job in jobs]
            time.sleep(SECONDS)
            last, ended = steps(folder), [sum(psutil.Process(job.pid).cpu_times()[:2]) for job in jobs]
            copied = sum(file.stat().st_size for file in (folder / "node1").rglob("step-*.pt"))
        finally:
            for job in jobs:
                job.send_signal(signal.SIGTERM)
            for job in jobs:
                job.wait(60)
        return (last - first) / SECONDS, sum(ended) - sum(begun), copied


def start(folder: Path, rank: int, checkpoints: str) -> "subprocess.Popen[bytes]":
    environ = {
        **os.environ,
        "NODES": "127.0.0.1,127.0.0.2",
        "NODE_RANK": str(rank),
        "NPROC_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "RUNS_ROOT": str(folder / f"node{rank}"),
        "CHECKPOINTS": checkpoints,
    }
    with (folder / f"log{rank}").open("wb") as log:
        command = [sys.executable, str(ROOT / "entrypoint.py"), "run", str(folder / "script.py")]
        return subprocess.Popen(command, env=environ, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def wait_for(log: Path, pattern: str) -> None:
    until = time.monotonic() + 120
    while not re.search(pattern, log.read_text()):
        if time.monotonic() > until:
            sys.exit(f"no {pattern!r}:\n{log.read_text()}")
        time.sleep(0.05)


def steps(folder: Path) -> int:
    return int((re.findall(r"step (\d+)", (folder / "log0").read_text()) or [0])[-1])


if __name__ == "__main__":
    sys.exit(main())
