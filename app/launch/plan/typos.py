"""Misspelt variables, by the nearest known name. A misspelt setting is silently no setting at all."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from app.launch.envfile import Value
from app.launch.settings import BY_NAME

KNOWN_FILE = Path(__file__).parent / "data" / "variables.txt"
"""Variables that NCCL 2.30, Gloo and torch 2.13 read, from their documentation, sources and binaries."""
INNOCENT = frozenset({"NODE", "NODE_NAME", "NODE_IP", "NODE_VERSION", "HOSTNAME", "RUNNER_NAME", "DATE", "IMAGES"})
"""Names of other programs that happen to be one letter away from one of ours."""


def known_variables() -> frozenset[str]:
    return frozenset(KNOWN_FILE.read_text(encoding="utf-8").split())


def misspelt(values: Mapping[str, Value]) -> list[tuple[str, str]]:
    """(name, what was probably meant) of each variable that nobody reads but that is close to one that is read."""
    suspects = [name for name in values if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{3,}", name) and name not in BY_NAME]
    if not suspects:
        return []
    libraries = known_variables()
    everything = sorted({*BY_NAME, *libraries})
    found = [(name, _meant(name, everything)) for name in sorted(suspects) if name not in libraries | INNOCENT]
    return [(name, meant) for name, meant in found if meant is not None]


def _meant(name: str, known: Iterable[str]) -> str | None:
    upper = name.upper()
    near = difflib.get_close_matches(upper, [each for each in known if _same_start(upper, each)], n=1, cutoff=0.88)
    if not near or near[0] == name:
        return None
    return near[0]


def _same_start(name: str, known: str) -> bool:
    # Most of an environment is other programs': a cheap look first keeps difflib to the few that could be meant.
    return abs(len(name) - len(known)) <= 3 and name[0] == known[0]
