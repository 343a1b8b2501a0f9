"""Seconds from `kill -9` of a rank to the next training step, beside a fresh start's seconds to its first step.

    python benchmarks/train_recovery.py

One node, two ranks, the launcher and the training script as shipped; the default model, a checkpoint every 10 steps.
"""

import os
import platform
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
RESULTS = ROOT / "benchmarks/results/train_recovery.md"
ROUNDS, DEADLINE = 5, 120.0
FLAGS = "--steps 100000 --log-every 1 --checkpoint-every 10 --eval-every 0"


def main() -> None:
    """Measures, prints and writes."""
    fresh, again = zip(*(one_round() for _ in range(ROUNDS)), strict=True)
    ratio = statistics.median(again) / statistics.median(fresh)
    text = f"""# Time to the next step after `kill -9` of a rank

Made by `benchmarks/train_recovery.py` on {platform.machine()}, {os.cpu_count()} cores, Python
{platform.python_version()}; one node, 2 ranks, {ROUNDS} rounds, wall-clock seconds.

| | median | best | worst |
|---|---|---|---|
| fresh start to the first step | {statistics.median(fresh):.1f} | {min(fresh):.1f} | {max(fresh):.1f} |
| `kill -9` of a rank to the next step | {statistics.median(again):.1f} | {min(again):.1f} | {max(again):.1f} |

Ratio of the medians: {ratio:.2f}.
"""
    print(text)
    RESULTS.write_text(text)


def one_round() -> tuple[float, float]:
    """Seconds of a fresh start, and of a recovery in the same job."""
    with tempfile.TemporaryDirectory() as folder:
        environ = os.environ | {"RUNS_ROOT": f"{folder}/runs", "NPROC_PER_NODE": "2", "TRAIN_ARGS": FLAGS}
        log = Path(folder, "log")
        with log.open("wb") as output:
            began = time.monotonic()
            command = [sys.executable, str(ROOT / "entrypoint.py")]
            job = subprocess.Popen(command, cwd=folder, env=environ, stdout=output, stderr=subprocess.STDOUT)
        try:
            seconds_to_start = wait_for(log, r"step 1/") - began
            wait_for(log, r"step 25/")
            killed = time.monotonic()
            kill_a_rank(job.pid)
            return seconds_to_start, wait_for(log, r"resumed after step[^\n]*\n(?s:.*?)step \d+/") - killed
        finally:
            job.send_signal(signal.SIGTERM)
            job.wait(DEADLINE)


def wait_for(log: Path, pattern: str, times: int = 1) -> float:
    """The time at which the pattern has been said so often. Exits when that takes too long."""
    deadline = time.monotonic() + DEADLINE
    while len(re.findall(pattern, log.read_text(errors="replace"))) < times:
        if time.monotonic() > deadline:
            sys.exit(f"no {pattern!r} within {DEADLINE:g} s:\n{log.read_text()[-4000:]}")
        time.sleep(0.02)
    return time.monotonic()


def kill_a_rank(job: int) -> None:
    """SIGKILL to the worker of local rank 1."""
    for process in psutil.Process(job).children(recursive=True):
        if process.environ().get("LOCAL_RANK") == "1":
            process.kill()
            return
    sys.exit("there is no worker to kill")


if __name__ == "__main__":
    main()
