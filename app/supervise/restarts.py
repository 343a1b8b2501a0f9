"""How long each part of a restart took on this node: written once, when the script has done its first step, or when the
round is over and it has not."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from app.engine.outcome import Moments

MARKS = "TORCHRUN_COMPOSE_MARKS"
"""Names the file to which a script adds a line for what it has reached: `NAME SECONDS-SINCE-THE-EPOCH`."""
REACHED = ("rendezvous", "checkpoint load", "first step")
LOOK = 0.2
"""Seconds between two looks into it."""
MOST_MARKS = 4096


def marks_file(folder: Path, run_id: str) -> Path:
    return folder / f"marks-{run_id}"


def parts(before: Moments, after: Moments, reached: Mapping[str, float]) -> dict[str, float]:
    """Seconds by name, in order; without those whose beginning or end nobody saw: the death on another node."""
    moments = {
        "": before.died,
        "detection": before.told,
        "stop": before.ended,
        "agreement": after.launched,
        "fork": after.begun,
        **{name: reached.get(name, 0.0) for name in REACHED},
    }
    steps = itertools.pairwise(moments.items())
    return {name: round(max(0.0, end - begin), 3) for (_, begin), (name, end) in steps if begin and end}


def read_marks(file: Path) -> dict[str, float]:
    """The first of each name. Never raises OSError."""
    found = dict[str, float]()
    with contextlib.suppress(OSError):
        with file.open(encoding="utf-8", errors="replace") as stream:
            lines = stream.read(MOST_MARKS).splitlines()
        for name, _, at in (line.rpartition(" ") for line in lines):
            with contextlib.suppress(ValueError):
                found.setdefault(name, float(at))
    return found


def follow(
    before: Moments, after: Moments, file: Path, over: threading.Event, tell: Callable[[Mapping[str, float]], None]
) -> None:
    """Calls `tell` once with the parts. For a thread of its own."""
    reached = dict[str, float]()
    while REACHED[-1] not in reached and not over.wait(LOOK):
        reached = read_marks(file)
    tell(parts(before, after, read_marks(file)))
