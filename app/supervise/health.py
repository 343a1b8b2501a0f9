"""The state of a running launcher, for Docker's HEALTHCHECK and for people: `entrypoint.py healthcheck`.

The launcher rewrites a small file in its own folder (runtime_dir.py) every few seconds; healthy is a launcher that
lives and did so lately, whatever it is doing.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from app.supervise.files import off_loop
from app.supervise.runtime_dir import running

STATE = "state.json"
WRITE_EVERY = 5.0
FRESH = 30.0
"""Seconds after which a state that was not written again means a launcher that hangs."""


class State:
    """This launcher's state and its file."""

    def __init__(self, folder: Path, progress: Callable[[], str]) -> None:
        self._folder, self._progress = folder, progress
        self._known: dict[str, object] = {"state": "waiting", "round": 0}
        self._changed = asyncio.Event()

    def change(self, state: str, round_: int) -> None:
        self._known = {"state": state, "round": round_}
        self._changed.set()

    async def keep(self) -> None:
        """Writes the file while the event loop runs."""
        while True:
            self._changed.clear()
            # A full disk must not end a training.
            with contextlib.suppress(OSError):
                await off_loop(self._write, WRITE_EVERY)
            # Python 3.11's wait_for swallows a cancel that comes as the awaited ends.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WRITE_EVERY):
                    await self._changed.wait()

    def _write(self) -> None:
        new = self._folder / f"{STATE}.new"
        new.write_text(json.dumps({**self._known, "progress": self._progress(), "time": time.time()}))
        new.replace(self._folder / STATE)


def healthcheck(folders: Sequence[Path] | None = None) -> int:
    """Prints every launcher of this user, one a line; 0 if there is one and all are well, 1 otherwise."""
    states = [state for folder in (running() if folders is None else folders) if (state := _read(folder / STATE))]
    ages = [time.time() - float(str(state["time"])) for state in states]
    for state, age in zip(states, ages, strict=True):
        progress = f"last progress: {state['progress']}" if state["progress"] else "no progress yet"
        stale = f", no heartbeat for {age:.0f} s" if age > FRESH else ""
        print(f"{state['state']}, round {state['round']}, {progress}{stale}")
    if not states:
        print("no launcher is running")
    return 0 if states and max(ages) <= FRESH else 1


def _read(path: Path) -> dict[str, object] | None:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return fields if isinstance(fields, dict) and {"state", "round", "progress", "time"} <= fields.keys() else None
