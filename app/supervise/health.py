"""The state of a running launcher, for Docker's HEALTHCHECK and for people: `entrypoint.py healthcheck`.

The launcher rewrites a small file in the temporary folder (writable in a read-only container, too) every few
seconds; healthy is a launcher that lives and did so lately, whatever it is doing.
"""

import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WRITE_EVERY = 5.0
FRESH = 30.0
"""Seconds after which a state that was not written again means a launcher that hangs."""


def keep_state(run_name: str, node_rank: int, progress: Callable[[], str]) -> tuple[Path, Callable[[str, int], None]]:
    """Keeps this launcher's state file fresh while the event loop runs; returns its path and the way to change it."""
    path = _folder() / f"{_prefix()}{run_name}-{node_rank}.json"
    known: dict[str, object] = {"state": "waiting", "round": 0}

    def change(state: str, round_: int) -> None:
        known.update(state=state, round=round_)
        _write(path, {**known, "progress": progress()})

    def again() -> None:
        if path.exists():
            _write(path, {**known, "progress": progress()})
            asyncio.get_running_loop().call_later(WRITE_EVERY, again)

    change("waiting", 0)
    asyncio.get_running_loop().call_later(WRITE_EVERY, again)
    return path, change


def healthcheck(folder: Path | None = None) -> int:
    """Prints every launcher of this user, one a line; 0 if there is one and all are well, 1 otherwise."""
    states = [_read(path) for path in sorted((folder or _folder()).glob(f"{_prefix()}*.json"))]
    alive = [state for state in states if state and _is_alive(int(str(state["pid"])))]
    ages = [time.time() - float(str(state["time"])) for state in alive]
    for state, age in zip(alive, ages, strict=True):
        progress = f"last progress: {state['progress']}" if state["progress"] else "no progress yet"
        stale = f", no sign of life for {age:.0f} s" if age > FRESH else ""
        print(f"{state['state']}, round {state['round']}, {progress}{stale}")
    if not alive:
        print("no launcher is running")
    return 0 if alive and max(ages) <= FRESH else 1


def _write(path: Path, fields: dict[str, object]) -> None:
    # A full disk must not end a training.
    with contextlib.suppress(OSError):
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**fields, "pid": os.getpid(), "time": time.time()}))
        new.replace(path)


def _read(path: Path) -> dict[str, object] | None:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return (
        fields if isinstance(fields, dict) and {"pid", "state", "round", "progress", "time"} <= fields.keys() else None
    )


def _folder() -> Path:
    return Path(tempfile.gettempdir())


def _prefix() -> str:
    return f"torchrun-compose-{os.getuid()}-"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
