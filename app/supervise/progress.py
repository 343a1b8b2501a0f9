"""What the folder of a run shows while it runs, and what its ranks tell: how far the training is, whether it stands.

Both are read in threads of their own: a file server that does not answer must not stop the heartbeat of a healthy node.
"""

import asyncio
import contextlib
import json
import math
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.engine.outcome import Stall
from app.plan import Plan
from app.supervise.files import in_time, start_thread
from app.supervise.hang import StalledHeartbeat, forget_stalls, keep_stalls, read_stalls

READ_EVERY = 1.0
PATIENCE = 2.0
"""Seconds that fresh progress is waited for."""
KEEP_LIMIT = 5.0
LONGEST = 100
"""Bytes of RUN_DIR/progress that are read."""
METRICS_END = 16_384
"""Bytes of RUN_DIR/metrics.jsonl that are read."""
FIGURES = ("step", "loss", "tokens_per_second")
"""Names in a line of that file, as app.train writes them; any script may."""


@dataclass(slots=True, kw_only=True)
class Gained:
    """The progress of a job: a text that changes when the script has gained something, and at nothing else."""

    text: str = ""
    time: float = 0.0
    """Seconds since the epoch, when `text` last changed; 0 before."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The newest of FIGURES that the script has written, for people."""
    _steps: tuple[int, ...] = ()
    _seen: set[str] = field(default_factory=set)

    def read(self, run_dir: Path, checkpoint_dir: Path) -> None:
        """The first line of RUN_DIR/progress if the script writes that file: its whole numbers must have risen, or
        without numbers it must be new. Otherwise the newest entry of CHECKPOINT_DIR, hidden and temporary ones apart,
        whose name must be new: a file that is written again and again shows no gain. Never raises OSError."""
        self.figures = read_figures(run_dir / "metrics.jsonl")
        before, line = self.text, first_line(run_dir / "progress")
        self._read(line, checkpoint_dir)
        if self.text != before:
            self.time = time.time()

    def _read(self, line: str | None, checkpoint_dir: Path) -> None:
        if line is not None:
            steps = tuple(int(number) for number in re.findall(r"(?<![\d.])\d{1,18}(?![\d.])", line))
            if steps > self._steps or (line and not steps and line not in self._seen):
                self.text, self._steps = line, max(steps, self._steps)
                self._seen.add(line)
            return
        entries = checkpoints(checkpoint_dir)
        if new := [name for name in entries if name not in self._seen]:
            self.text = new[-1][:80]
            self._seen.update(new)


def first_line(path: Path) -> str | None:
    """Of a regular file, cut; None for anything else."""
    content = _read_part(path, LONGEST)
    return None if content is None else content.partition("\n")[0]


def read_figures(path: Path) -> dict[str, float]:
    """The newest number of each of FIGURES in a file of JSON lines; a torn line is left out. Never raises OSError."""
    found: dict[str, float] = {}
    for line in reversed((_read_part(path, METRICS_END, end=True) or "").splitlines()):
        with contextlib.suppress(ValueError, AttributeError):
            fields = json.loads(line).items()
            numbers = {name: float(value) for name, value in fields if name in FIGURES and _is_number(value)}
            found = numbers | found
        if len(found) == len(FIGURES):
            break
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_part(path: Path, size: int, *, end: bool = False) -> str | None:
    """The first bytes of a regular file, or the last; None for anything else."""
    with contextlib.suppress(OSError):
        # A pipe without a writer would block whoever opens it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                start = max(0, status.st_size - size) if end else 0
                return os.pread(descriptor, size, start).decode(errors="replace")
        finally:
            os.close(descriptor)
    return None


def checkpoints(folder: Path) -> list[str]:
    """The names of whatever a script has completed there, oldest first."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            # An entry may vanish meanwhile, and a link may lead nowhere.
            with contextlib.suppress(OSError):
                if _is_complete(entry.name):
                    found.append((entry.stat().st_mtime, entry.name))
    return [name for _, name in sorted(found)]


def _is_complete(name: str) -> bool:
    return not name.startswith(".") and "tmp" not in name and not name.endswith((".new", ".partial"))


class TrainingProgress:
    """The newest that is known of both, brought up to date every second."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None], engine: Callable[[], int]) -> None:
        """`folder` is the ranks'; `engine` tells torchrun's process id, 0 for none or while it is being ended. Reads
        nothing yet."""
        self.stalls: Sequence[Stall] = ()
        self._plan, self._folder, self._say, self._engine = plan, folder, say, engine
        self._gained = Gained()
        self._asked = self._answered = 0
        self._wanted = threading.Event()
        start_thread(self._read_progress, "progress")
        start_thread(self._read_ranks, "stalls")

    @property
    def text(self) -> str:
        return self._gained.text

    @property
    def gained(self) -> Gained:
        """As it was a moment ago; not to be changed."""
        return self._gained

    async def renew(self) -> None:
        """Returns after `text` was read by a reading that began after this call, or after PATIENCE seconds."""
        self._asked += 1
        wanted, until = self._asked, time.monotonic() + PATIENCE
        self._wanted.set()
        while self._answered < wanted and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def _read_progress(self) -> None:
        script = self._plan.script
        while True:
            self._wanted.clear()
            asked = self._asked
            self._gained.read(script.run_dir, script.checkpoint_dir)
            self._answered = asked
            self._wanted.wait(READ_EVERY)

    def _read_ranks(self) -> None:
        heartbeats: dict[int, StalledHeartbeat] = {}
        stopped = 0
        while self._folder.exists():
            before, self.stalls = self.stalls, read_stalls(self._plan, self._folder, heartbeats)
            if bool(before) != bool(self.stalls):
                self._keep()
            stopped = self._check_engine(stopped)
            time.sleep(READ_EVERY)

    def _keep(self) -> None:
        with contextlib.suppress(OSError):
            if self.stalls:
                in_time(lambda: keep_stalls(self._plan, self._folder), KEEP_LIMIT)
            elif self._engine():
                # What moves while a round is being ended is no progress, and the report wants the stacks.
                in_time(lambda: forget_stalls(self._plan), KEEP_LIMIT)

    def _check_engine(self, stopped: int) -> int:
        """Tells once of a torchrun that somebody has stopped, which tells of no failure any more; returns its pid."""
        pid = self._engine()
        if not pid or not _is_stopped(pid):
            return 0
        if pid != stopped:
            told = f"warning: torchrun (process {pid}) was stopped by a signal, and tells of no failure meanwhile."
            self._say(f"{told} Fix: kill -CONT {pid}")
        return pid


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "Tt"
    return False
