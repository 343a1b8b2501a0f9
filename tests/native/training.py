"""Runs of the training script under real torchrun, on CPU: tiny models, real processes, real signals.

Each run is forked from a process that has torch loaded, as users' are; tests/native/test_train_faults.py has one under
plain torchrun."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from app.engine.command import WORKER
from app.engine.warm import AGENT, STEP, Forked, Preloaded
from tests.native.ports import free_port

ROOT = Path(__file__).parents[2]
TINY = "--layers 1 --heads 2 --width 32 --context 32 --batch 10 --micro-batch 3 --log-every 1 --eval-every 0 --sample 0"
"""Ten sequences in micro-batches of three make uneven shares and uneven micro-batches with 2, 3 and 4 ranks."""


LOADED = ("torch", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.nn.parallel")
SERVERS = dict[str, Preloaded]()
"""Those of the running test, by run folder: one environment each, or a worker would start cold."""


@dataclass
class Agent:
    """One torchrun agent: what runs on one node."""

    process: Forked
    log: Path
    run_dir: Path
    told: BinaryIO
    """What the agent tells the launcher."""

    def wait(self, seconds: float = 120) -> int:
        """Torchrun's exit code."""
        return self.process.wait(seconds)

    def text(self) -> str:
        """All output so far without its ranks, and what torchrun told of its workers if it has ended."""
        told = self.told.read() if self.process.poll() is not None else b""
        if told:
            self.log.write_text(self.log.read_text(errors="replace") + told.decode())
        return re.sub(r"^\[rank \d+\] ", "", self.log.read_text(errors="replace"), flags=re.MULTILINE)

    def ranks(self) -> list[psutil.Process]:
        """The worker processes, in rank order."""
        return [process for title, process in sorted(self._forked()) if title.startswith("rank")]

    def kill_all(self) -> None:
        """What the death of a node does: the agent and its workers are gone at once."""
        processes = [process for _, process in self._forked()]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=20)
        self.process.wait(20)

    def _forked(self) -> Iterator[tuple[str, psutil.Process]]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(SERVERS[str(self.run_dir)].pid).children():
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    yield " ".join(each.cmdline()), each


def stop_servers() -> None:
    while SERVERS:
        SERVERS.popitem()[1].stop()


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
    """Starts one agent as a launcher does, from a process that has torch loaded, and leaves nothing of it behind."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir / f"output-{time.monotonic_ns()}.txt"
    arguments = ["--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(nproc)]
    arguments += ["--master-addr", "127.0.0.1", "--master-port", str(port or free_port()), "--max-restarts", "0"]
    arguments += [str(WORKER), "-m", "app.train", *TINY.split(), *flags.split()]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRAIN_", "PET_"))}
    ours = {"RUN_DIR": str(run_dir), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environ or {})}
    server = SERVERS.setdefault(str(run_dir), Preloaded(LOADED, clean | ours, _must_load))
    asked = server.start()
    assert asked
    read, write = os.pipe()
    with log.open("wb") as output, Path(os.devnull).open("rb") as nothing, os.fdopen(read, "rb") as told:
        outputs = [nothing.fileno(), output.fileno(), output.fileno(), write]
        agent = Agent(asked.fork(AGENT, arguments, clean | ours, outputs), log, run_dir, told)
        os.close(write)
        while not agent.process.pid and agent.process.poll() is None:
            asked.pause(STEP)
        try:
            yield agent
        finally:
            agent.kill_all()


def _must_load(module: str, why: str) -> None:
    raise AssertionError(f"{module}: {why}")


def train(run_dir: Path, flags: str, *, nproc: int = 2, environ: Mapping[str, str] | None = None) -> tuple[int, str]:
    """One whole run on one node: torchrun's exit code and all output."""
    with torchrun(run_dir, flags, nproc=nproc, environ=environ) as agent:
        return agent.wait(), agent.text()


def worker_codes(text: str) -> set[int]:
    """Exit codes of workers that torchrun reports; it names the first to fail and those that ended with it."""
    return {int(code) for code in re.findall(r'"exitcode": (-?\d+)', text)}


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
