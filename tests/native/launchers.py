"""Real launchers on this machine: every address of 127/8 is local, so each node has its own, and NODE_RANK tells it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.native.ports import free_port

PROJECT = Path(__file__).resolve().parents[2]
AGENT = "app/engine/agent.py"
FORKED_AGENT, PRELOADED = "torchrun-compose: torchrun", "torchrun-compose: preloaded"
"""Titles of processes."""

ALL_REDUCE = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
local = [int(os.environ[name]) for name in ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
for step in range(int(sys.argv[1])):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == size
    if step == 3:
        print(f"trains: rank {rank} of {size}, place {local}, pid {os.getpid()}", flush=True)
    time.sleep(0.05)
dist.destroy_process_group()
"""


ONE_FAILS = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 1:
    raise ValueError("bad batch")
dist.all_reduce(torch.ones(1))
"""


@dataclass
class Launcher:
    """One node's launcher with all that it printed so far."""

    process: subprocess.Popen[str]
    text: str = ""
    seen: dict[str, float] = field(default_factory=dict)
    _news: threading.Condition = field(default_factory=threading.Condition)
    _reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            with self._news:
                self.text += line
                self.seen.setdefault(line, time.monotonic())
                self._news.notify_all()

    def wait_for(self, pattern: str, seconds: float = 30) -> re.Match[str]:
        """The first match of `pattern` in the output; fails the test after `seconds`."""
        until = time.monotonic() + seconds
        with self._news:
            while not (found := re.search(pattern, self.text)):
                left = until - time.monotonic()
                assert left > 0, f"no {pattern!r} within {seconds} s in:\n{self.text}"
                self._news.wait(left)
        return found

    def when(self, pattern: str) -> float:
        """Monotonic time at which the first line with `pattern` was printed."""
        with self._news:
            return min(at for line, at in self.seen.items() if re.search(pattern, line))

    def end(self, seconds: float = 30) -> int:
        """Waits for the end and for the last of the output; returns the exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    @property
    def said(self) -> list[str]:
        """The launcher's own lines, without its prefix."""
        return re.findall(r"^torchrun-compose: (.*)$", self.text, re.MULTILINE)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def workers(self) -> list[psutil.Process]:
        """The processes below torchrun; those that were forked stand beside it."""
        return [
            each for each, title in self._below() if not title.startswith("torchrun-compose:") and AGENT not in title
        ]

    def agents(self) -> list[psutil.Process]:
        return [each for each, title in self._below() if title.startswith(FORKED_AGENT) or AGENT in title]

    def preloaded(self) -> list[psutil.Process]:
        """The process from which agents and workers are forked."""
        own = psutil.Process(self.process.pid)
        return [each for each, title in self._below() if title.startswith(PRELOADED) and each.parent() == own]

    def _below(self) -> Iterator[tuple[psutil.Process, str]]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    yield each, " ".join(each.cmdline())


@dataclass
class Nodes:
    """Nodes of one job on one machine, started one by one."""

    folder: Path
    count: int
    script: Path
    settings: dict[str, str] = field(default_factory=dict)
    apart: bool = False
    """Each node's current folder is on its own disk as well."""
    output: int = subprocess.PIPE
    launchers: list[Launcher] = field(default_factory=list)

    def start(self, rank: int, *arguments: str, **settings: str) -> Launcher:
        """Starts the launcher of one node; `settings` win over those of all nodes."""
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        environment = {
            **inherited,
            "NODES": ",".join(f"127.0.0.{number + 1}" for number in range(self.count)),
            "NODE_RANK": str(rank),
            "NPROC_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "RUNS_ROOT": str(self.disk(rank)),
            **self.settings,
            **settings,
        }
        self.disk(rank).mkdir(exist_ok=True)
        words = ("run", str(self.script), *arguments)
        folder = self.disk(rank) if self.apart else self.folder
        self.launchers.append(launch(folder, environment, *words, output=self.output))
        return self.launchers[-1]

    def disk(self, rank: int) -> Path:
        """Where a node keeps what outlives its launcher."""
        return self.folder / f"node{rank}"

    def start_all(self, *arguments: str) -> list[Launcher]:
        return [self.start(rank, *arguments) for rank in range(self.count)]


@contextlib.contextmanager
def nodes(folder: Path, count: int, script: str, **settings: str) -> Iterator[Nodes]:
    """`count` nodes that run `script` (Python source); afterwards nothing of them is left, which it checks."""
    path = folder / "script.py"
    path.write_text(script)
    made = Nodes(folder, count, path, {"MASTER_PORT": str(free_port()), **settings})
    with nothing_left(folder, made.launchers):
        yield made


def launch(folder: Path, environment: Mapping[str, str], *words: str, output: int = subprocess.PIPE) -> Launcher:
    """Starts a command of the entrypoint in `folder`. What is empty in `environment` is not set."""
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "entrypoint.py"), *words],
        env={name: value for name, value in environment.items() if value},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Launcher(process)


@contextlib.contextmanager
def nothing_left(folder: Path, launchers: Sequence[Launcher]) -> Iterator[None]:
    """Checks that no process works for `folder` afterwards; ends those of a test that failed."""
    try:
        yield
        assert not left_behind(folder), "processes outlived their launcher"
    finally:
        for launcher in launchers:
            launcher.process.kill()
        for process in left_behind(folder, patience=0):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def left_behind(folder: Path, patience: float = 5) -> list[psutil.Process]:
    """Processes that still work for the test of `folder` after `patience` seconds."""
    until = time.monotonic() + patience
    while found := [one for one in psutil.process_iter() if _works_for(one, str(folder))]:
        if time.monotonic() > until:
            return found
        time.sleep(0.05)
    return []


def _works_for(process: psutil.Process, folder: str) -> bool:
    with contextlib.suppress(psutil.Error):
        # Titles of forked processes need not name the folder in which they work.
        return process.status() != psutil.STATUS_ZOMBIE and any(
            folder in word for word in (*process.cmdline(), process.cwd())
        )
    return False
