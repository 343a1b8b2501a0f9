"""Seconds from `kill -9` of a rank to the next training step: `python -m benchmarks.train_recovery [ROUNDS]`.

One node, two ranks, the training script as shipped; the default model, a checkpoint every 10 steps. In turn: plain
torchrun from its start to the first step; ours from its start to the first step, and from a kill after step 25 to the
next step.
"""

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from benchmarks.pairs import PROJECT, environ, ours, settings, tell, torchrun

ROUNDS, DEADLINE = 5, 120.0
SCRIPT = ["-m", "app.train", "--steps=100000", "--log-every=1", "--checkpoint-every=10", "--eval-every=0"]


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    again = "ours, kill -9 to the next step"
    measured: dict[str, list[float]] = {"torchrun": [], "ours": [], again: []}
    for number in range(rounds + 1):
        turn = {"torchrun": fresh_torchrun(), **dict(zip(("ours", again), fresh_and_killed(), strict=True))}
        for what, seconds in turn.items() if number else ():
            measured[what].append(seconds)
    tell(measured, "torchrun")
    return 0


def fresh_torchrun() -> float:
    with (
        tempfile.TemporaryDirectory() as name,
        running(torchrun(*SCRIPT), environ() | {"RUN_DIR": name}, name) as (_, seconds, _),
    ):
        return seconds


def fresh_and_killed() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as name, running(ours(*SCRIPT), settings(Path(name)), name) as (log, fresh, pid):
        wait_for(log, r"step 25/")
        killed = time.monotonic()
        kill_a_rank(pid)
        return fresh, wait_for(log, r"resumed after step[^\n]*\n(?s:.*?)step \d+/") - killed


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
    """The time at which the pattern was first said. Exits when that takes too long."""
    deadline = time.monotonic() + DEADLINE
    while not re.search(pattern, log.read_text(errors="replace")):
        if time.monotonic() > deadline:
            sys.exit(f"no {pattern!r} within {DEADLINE:g} s:\n{log.read_text()[-4000:]}")
        time.sleep(0.01)
    return time.monotonic()


def kill_a_rank(job: int) -> None:
    """SIGKILL to the worker of rank 1, which has that in its title."""
    for process in psutil.Process(job).children(recursive=True):
        if process.cmdline()[:1] and process.cmdline()[0].startswith("rank1 "):
            process.kill()
            return
    sys.exit("there is no worker to kill")


if __name__ == "__main__":
    sys.exit(main())
