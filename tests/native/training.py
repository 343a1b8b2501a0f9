"""Runs of the training script under real torchrun, on CPU: tiny models, real processes, real signals."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.native.ports import free_port

ROOT = Path(__file__).parents[2]
TINY = "--layers 1 --heads 2 --width 32 --context 32 --batch 10 --micro-batch 3 --log-every 1 --eval-every 0 --sample 0"
"""Ten sequences in micro-batches of three make uneven shares and uneven micro-batches with 2, 3 and 4 ranks."""


@dataclass
class Agent:
    """One torchrun agent: what runs on one node."""

    process: subprocess.Popen[bytes]
    log: Path
    run_dir: Path
    workers: list[psutil.Process] = field(default_factory=list)

    def wait(self, seconds: float = 120) -> int:
        """Torchrun's exit code."""
        return self.process.wait(seconds)

    def text(self) -> str:
        """All output so far."""
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """The worker processes, in rank order of their start."""
        children = psutil.Process(self.process.pid).children()
        return sorted((c for c in children if "app.train" in " ".join(c.cmdline())), key=lambda c: c.pid)

    def kill_all(self) -> None:
        """What the death of a node does: the agent and its workers are gone at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(processes[1:], timeout=20)
        self.process.wait(20)


@contextlib.contextmanager
def torchrun(
    run_dir: Path,
    flags: str,
    *,
    nproc: int = 2,
    nodes: int = 1,
    node: int = 0,
    port: int = 0,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Agent]:
    """Starts one agent, and leaves nothing of it behind."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir / f"output-{time.monotonic_ns()}.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--node-rank", str(node)]
    command += ["--nproc-per-node", str(nproc), "--master-addr", "127.0.0.1", "--master-port", str(port or free_port())]
    command += ["--max-restarts", "0", "-m", "app.train", *TINY.split(), *flags.split()]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRAIN_", "PET_"))}
    ours = {"RUN_DIR": str(run_dir), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environ or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=run_dir, env=clean | ours, stdout=output, stderr=subprocess.STDOUT)
    agent = Agent(process, log, run_dir)
    try:
        yield agent
    finally:
        agent.kill_all()


def train(run_dir: Path, flags: str, *, nproc: int = 2, environ: Mapping[str, str] | None = None) -> tuple[int, str]:
    """One whole run on one node: torchrun's exit code and all output."""
    with torchrun(run_dir, flags, nproc=nproc, environ=environ) as agent:
        return agent.wait(), agent.text()


def worker_codes(text: str) -> set[int]:
    """Exit codes of workers that torchrun reports; it names the first to fail and those that ended with it."""
    return {int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+)", text)}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Every record with a loss that was ever written, in order; a line that a kill has torn is left out."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if "loss" in record]


def losses(run_dir: Path) -> dict[int, float]:
    """The last loss written of each step."""
    return {record["step"]: record["loss"] for record in records(run_dir)}


def complete(run_dir: Path) -> list[int]:
    """Steps of complete checkpoints."""
    return sorted(int(mark.parent.name[5:]) for mark in run_dir.glob("checkpoints/step-????????/.metadata"))


def until(condition: Callable[[], Any], agents: Sequence[Agent], *, seconds: float = 90, what: str) -> None:
    """Waits for an event; fails when time is up or when every agent has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        over = all(agent.process.poll() is not None for agent in agents)
        if time.monotonic() > deadline or (over and not condition()):
            raise AssertionError(f"waited in vain for {what}:\n" + "\n".join(agent.text() for agent in agents))
        time.sleep(0.002)
