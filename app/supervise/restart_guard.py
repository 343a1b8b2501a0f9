"""Keeps Docker from starting a finished job again: `restart: on-failure` restarts whatever ends non-zero.

A launcher that ends with a final verdict leaves a marker named after its container. Docker's own retry comes within
seconds and finds it; a start by a person comes later, or in a new container, and does not.
"""

import contextlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

RETRY_WINDOW = 6.0
"""Seconds. Docker waits 0.1 s before its first retry and doubles that each time (moby, restartmanager): at most 1.6 s
between five retries, plus the start of the container. Each refused start renews the marker."""

LONGEST, ROOM = 1000, 8192
"""Characters of a verdict, and bytes of a marker: a character takes at most six in JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    code: int
    text: str


def read_final(root: Path = Path("/")) -> Ending | None:
    """How this very container ended a moment ago, if it did; else forgets what an earlier run left. Never raises."""
    path = _marker(root)
    if path is None:
        return None
    try:
        fields = json.loads(path.read_text())
        ending = Ending(code=int(fields["code"]), text=str(fields["text"]))
        fresh = abs(time.time() - float(fields["time"])) < RETRY_WINDOW
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if fresh:
        write_final(ending.code, ending.text, root)
        return ending
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def write_final(code: int, text: str, root: Path = Path("/")) -> None:
    """Leaves the marker, inside a container only; best effort."""
    _overwrite(json.dumps({"code": code, "text": text[:LONGEST], "time": time.time()}), root)


def reserve_final(root: Path = Path("/")) -> None:
    """Takes the room for the marker while there is some: a full disk is one of the ends that it is for."""
    _overwrite("", root)


def forget_final(root: Path = Path("/")) -> None:
    """For an end after which Docker may start the container again."""
    path = _marker(root)
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _overwrite(content: str, root: Path) -> None:
    path = _marker(root)
    if path is not None:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, content.encode().ljust(ROOM))
            finally:
                os.close(descriptor)


def _marker(root: Path) -> Path | None:
    """Docker mounts the container's own hostname file from a folder named after its id.

    The folder of the marker is not taken from the plan: wrong settings are a verdict, too, and leave no plan.
    """
    folder = Path(os.environ.get("RUNS_ROOT") or "runs")
    with contextlib.suppress(OSError):
        found = re.search(r"/containers/([0-9a-f]{64})/", (root / "proc/self/mountinfo").read_text())
        return folder / f".final-{found[1][:16]}" if found else None
    return None
