"""Is a launcher alive here? For Docker's HEALTHCHECK and for people: `entrypoint.py healthcheck`.

Healthy is a launcher that lives and wrote its state lately (state.py), whatever it is doing.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.supervise.runtime_dir import running
from app.supervise.state import STATE

FRESH = 30.0
"""Seconds after which a state that was not written again means a launcher that hangs."""


def healthcheck(folders: Sequence[Path] | None = None) -> int:
    """Prints every launcher of this user, one a line; 0 if there is one and all are well, 1 otherwise."""
    states = read_states(folders)
    ages = [time.time() - state["time"] for state in states]
    for state, age in zip(states, ages, strict=True):
        progress = f"last progress: {state['progress']}" if state["progress"] else "no progress yet"
        stale = f", no heartbeat for {age:.0f} s" if age > FRESH else ""
        print(f"{state['state']}, round {state['round']}, {progress}{stale}")
    if not states:
        print("no launcher is running")
    return 0 if states and max(ages) <= FRESH else 1


def read_states(folders: Sequence[Path] | None = None) -> list[Mapping[str, Any]]:
    """Of all launchers of this user that live."""
    found = [_read(folder) for folder in (running() if folders is None else folders)]
    return [state for state in found if state]


def _read(folder: Path) -> Mapping[str, Any] | None:
    try:
        fields = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return None
    wanted = {"state", "round", "progress", "time"}
    return {**fields, "folder": str(folder)} if isinstance(fields, dict) and wanted <= fields.keys() else None
