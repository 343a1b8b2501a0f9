"""Two nodes on one GPU: with another NCCL_HOSTID each, NCCL takes two launchers of one machine for two hosts.

    make gpu                    # on a machine with an NVIDIA GPU; writes the table of docs/gpu.md
    GPU_REHEARSAL=1 .venv/bin/python -m pytest tests/gpu      # the same tests with gloo on CPUs: no GPU is proved by it

Any torch from 2.8 on and any Python from 3.11 on will do, with pytest and psutil: no Docker, no root.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from app.host.accelerators import read_gpus
from tests.native.launchers import PROJECT, Launcher, launch, nothing_left
from tests.native.ports import free_port

HERE = bool(read_gpus(Path("/")).visible)
FOR_CPUS = "+cpu" in metadata.version("torch")
GPU = HERE and not FOR_CPUS
REHEARSAL = not GPU and os.environ.get("GPU_REHEARSAL") == "1"
PAGE = PROJECT / "docs/gpu.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
ROWS = pytest.StashKey[list[str]]()


@dataclass
class Bed:
    """Launchers of two nodes on this machine, and what one of them is to be remembered by."""

    folder: Path
    port: int = field(default_factory=free_port)
    started: list[Launcher] = field(default_factory=list)
    found: str = ""
    """For the table."""

    def start(self, rank: int, command: str, *words: str, **settings: str) -> Launcher:
        """`settings` with an empty value are not set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL_", "GLOO_", "TORCH_", "PET_", "TRAIN_"))}
        on_gpu = {"CUDA_VISIBLE_DEVICES": "0", "NCCL_HOSTID": f"node{rank}", "NCCL_MNNVL_ENABLE": "0"}
        env = {
            **kept,
            **(on_gpu if GPU else {}),
            "HARDWARE": "nvidia" if GPU else "cpu",
            "NODES": "127.0.0.1,127.0.0.2",
            "NODE_RANK": str(rank),
            "NPROC_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "MASTER_PORT": str(self.port),
            "RUNS_ROOT": str(self.folder / f"node{rank}"),
            "TMPDIR": str(self.folder),
            **settings,
        }
        self.started.append(launch(self.folder, env, command, *words))
        return self.started[-1]

    def both(self, command: str, *words: str, **settings: str) -> list[Launcher]:
        return [self.start(rank, command, *words, **settings) for rank in (0, 1)]

    def script(self, text: str, *words: str, **settings: str) -> list[Launcher]:
        """Both nodes run a script of this text."""
        (self.folder / "script.py").write_text(text)
        return self.both("run", str(self.folder / "script.py"), *words, **settings)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path)
    with nothing_left(tmp_path, made.started):
        yield made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    missing = "no NVIDIA GPU on this machine"
    if HERE:
        missing = f"the torch of {sys.executable} is built for CPUs; name another Python with TEST_PYTHON"
    reason = f"{missing}: nothing of tests/gpu was run (GPU_REHEARSAL=1 rehearses it on CPUs)"
    for item in here:
        if not (GPU or REHEARSAL):
            item.add_marker(pytest.mark.skip(reason=reason))
        elif REHEARSAL and item.get_closest_marker("needs_gpu"):
            item.add_marker(pytest.mark.skip(reason="a rehearsal on CPUs: this one needs a GPU"))
    config.stash[ROWS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    bed = getattr(item, "funcargs", {}).get("bed")
    if report.when == "call" and isinstance(bed, Bed) and not report.skipped:
        said = bed.found.replace("|", "\\|")[:300]
        item.config.stash[ROWS].append(f"| {item.name} | {report.outcome} | {report.duration:.1f} s | {said} |\n")
        if report.failed:
            report.sections += [(f"launcher {n}", each.text[-6000:]) for n, each in enumerate(bed.started)]
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The table of a real card goes into the page; that of a rehearsal never does."""
    rows = session.config.stash.get(ROWS, [])
    if GPU and rows and "PYTEST_XDIST_WORKER" not in os.environ:
        head = f"{about()}\n\n| test | result | took | said |\n|---|---|---|---|\n"
        text = PAGE.read_text()
        PAGE.write_text(
            re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}{head}{''.join(rows)}{END}", text, flags=re.DOTALL)
        )


def about() -> str:
    """Card, driver, torch and NCCL, asked of torch in a process of its own."""
    ask = "import torch; print(torch.cuda.get_device_name(0), torch.__version__, torch.cuda.nccl.version(), sep='; ')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=False)
    card, torch, nccl = (done.stdout.strip().split("; ") + ["unknown"] * 3)[:3]
    driver = read_gpus(Path("/")).driver or "unknown"
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    machine = f"Python {platform.python_version()}, {psutil.cpu_count()} cores, {when}"
    return f"{card}, driver {driver}, torch {torch}, NCCL {nccl}, {machine}:"


def until(condition: object, seconds: float, what: str) -> None:
    """Waits for an event on disk."""
    end = time.monotonic() + seconds
    while not (callable(condition) and condition()):
        assert time.monotonic() < end, f"{what} did not come within {seconds:g} s"
        time.sleep(0.05)
