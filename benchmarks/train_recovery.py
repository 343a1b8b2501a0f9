"""Seconds from `kill -9` of a rank to the next training step: `python -m benchmarks.train_recovery [ROUNDS]`.

One node, two ranks, the training script as shipped; the default model, a checkpoint every 10 steps. In turn: plain
torchrun from its start to the first step; ours from its start to the first step, and from a kill after step 25 to the
next step; the same with what the script imports besides torch preloaded, too. Then the medians of a restart's parts.
"""

import contextlib
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from benchmarks.pairs import PROJECT, environ, ours, settings, tell, torchrun

ROUNDS, DEADLINE = 5, 120.0
MORE = "torch._dynamo,torch.distributed.checkpoint.state_dict,torch.distributed.fsdp"
"""What it imports at the latest in its first step: every optimizer of torch has the first of them imported."""
SCRIPT = ["-m", "app.train", "--steps=100000", "--log-every=1", "--checkpoint-every=10", "--eval-every=0"]


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    measured, parts = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for _ in range(rounds):
        measured["torchrun"].append(fresh_torchrun())
        for what, modules in (("ours", "torch"), ("ours, more preloaded", f"torch,{MORE}")):
            fresh, again, took = fresh_and_killed(modules)
            measured[what].append(fresh)
            measured[f"{what}: kill -9 to the next step"].append(again)
            for part, seconds in took.items() if what == "ours" else ():
                parts[part].append(seconds)
    tell(measured, "torchrun")
    print(", ".join(f"{part} {statistics.median(seconds):.2f}" for part, seconds in parts.items()))
    return 0


def fresh_torchrun() -> float:
    with (
        tempfile.TemporaryDirectory() as name,
        running(torchrun(*SCRIPT), environ() | {"RUN_DIR": name}, name) as (_, seconds, _),
    ):
        return seconds


def fresh_and_killed(modules: str) -> tuple[float, float, dict[str, float]]:
    """Seconds to the first step, from the kill to the next step, and of the restart's parts."""
    with (
        tempfile.TemporaryDirectory() as name,
        running(ours(*SCRIPT), settings(Path(name), PRELOAD=modules), name) as (log, fresh, pid),
    ):
        wait_for(log, r"step 25/")
        killed = time.monotonic()
        kill_a_rank(pid)
        again = wait_for(log, r"resumed after step[^\n]*\n(?s:.*?)step \d+/") - killed
        kept = Path(name, "default/logs/node0/restarts.jsonl")
        wait_until(lambda: kept.exists() and kept.read_text().endswith("\n"), str(kept))
        return fresh, again, json.loads(kept.read_text())["parts"]


@contextlib.contextmanager
def running(command: list[str], env: Mapping[str, str], folder: str) -> Iterator[tuple[Path, float, int]]:
    """A job in its first step: its log, how long that took, and its process id."""
    log = Path(folder, "log")
    with log.open("wb") as output:
        began = time.monotonic()
        job = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield log, wait_for(log, r"step 1/") - began, job.pid
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait(DEADLINE)


def wait_for(log: Path, pattern: str) -> float:
    """The time at which the pattern was first said."""
    return wait_until(lambda: re.search(pattern, log.read_text(errors="replace")), f"{pattern!r} in {log}")


def wait_until(happened: Callable[[], object], what: str) -> float:
    """The time. Exits when that takes too long."""
    deadline = time.monotonic() + DEADLINE
    while not happened():
        if time.monotonic() > deadline:
            sys.exit(f"no {what} within {DEADLINE:g} s")
        time.sleep(0.01)
    return time.monotonic()


def kill_a_rank(job: int) -> None:
    """SIGKILL to the worker of rank 1, which has that in its title."""
    for process in psutil.Process(job).children(recursive=True):
        # psutil may take the title apart at its spaces.
        if " ".join(process.cmdline()).startswith("rank1 "):
            process.kill()
            return
    sys.exit("there is no worker to kill")


if __name__ == "__main__":
    sys.exit(main())
