"""What the folder of a run shows while it runs: how far the training is, and whether its ranks stand still."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from app.engine.outcome import Stall
from app.plan import Plan
from app.supervise.hang import Silence, read_stalls

LOOK_EVERY = 1.0
PATIENCE = 2.0
"""Seconds that a fresh look is waited for."""


class Looks:
    """Looks from a thread of its own: a file system that stalls must not stop the heartbeat of a healthy node."""

    def __init__(self, plan: Plan) -> None:
        self.progress = progress(plan)
        self.stalls: Sequence[Stall] = ()
        self._plan = plan
        self._asked = self._answered = 0
        self._wanted = threading.Event()
        threading.Thread(target=self._look_again, name="looks", daemon=True).start()

    async def renew(self) -> None:
        """Returns after a look that began after this call, or after PATIENCE seconds."""
        self._asked += 1
        wanted, until = self._asked, time.monotonic() + PATIENCE
        self._wanted.set()
        while self._answered < wanted and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def _look_again(self) -> None:
        silences: dict[int, Silence] = {}
        while True:
            self._wanted.clear()
            asked = self._asked
            self.progress, self.stalls = progress(self._plan), read_stalls(self._plan, silences)
            self._answered = asked
            self._wanted.wait(LOOK_EVERY)


def progress(plan: Plan) -> str:
    """What changes when the training has got on, and at nothing else; "" for nothing yet.

    The first line of RUN_DIR/progress if the script writes that file. Otherwise the newest entry of CHECKPOINT_DIR,
    hidden and temporary ones apart: a file by name and time, since many scripts write one again and again, a folder by
    name alone, since a script that always fails while it saves would renew its time."""
    try:
        return (plan.script.run_dir / "progress").read_text(errors="replace").partition("\n")[0][:100]
    except OSError:
        pass
    try:
        found = [
            (entry.stat().st_mtime, entry) for entry in plan.script.checkpoint_dir.iterdir() if _is_complete(entry)
        ]
    except OSError:
        return ""
    if not found:
        return ""
    at, newest = max(found)
    return newest.name[:80] if newest.is_dir() else f"{newest.name[:80]} {at:.3f}"


def _is_complete(entry: Path) -> bool:
    return not entry.name.startswith(".") and "tmp" not in entry.name and not entry.name.endswith((".new", ".partial"))
