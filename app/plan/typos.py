"""Misspelt variables, by the nearest known name. A misspelt setting is silently no setting at all."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from app.config.settings import BY_NAME
from app.config.values import Value

KNOWN_FILE = Path(__file__).parent / "data" / "variables.txt"
"""Variables that NCCL 2.30, Gloo and torch 2.13 read, from their documentation, sources and binaries."""
INNOCENT = frozenset({"NODE", "NODE_NAME", "NODE_IP", "NODE_VERSION", "HOSTNAME", "RUNNER_NAME", "DATE", "IMAGES"})
"""Names of other programs that happen to be one letter away from one of ours."""


def known_variables() -> frozenset[str]:
    return frozenset(KNOWN_FILE.read_text(encoding="utf-8").split())


def misspelt(values: Mapping[str, Value[str]]) -> list[tuple[str, str]]:
    """(name, what was probably meant) of each variable that is unknown here but close to a known one."""
    suspects = [name for name in values if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{3,}", name) and name not in BY_NAME]
    if not suspects:
        return []
    libraries = known_variables()
    # Most of an environment is other programs': a cheap look first keeps difflib to the few that could be meant.
    by_initial: dict[str, list[str]] = {}
    for known in sorted({*BY_NAME, *libraries}):
        by_initial.setdefault(known[0], []).append(known)
    unread = sorted(name for name in suspects if name not in libraries and name not in INNOCENT)
    found = [(name, _meant(name, by_initial.get(name[0].upper(), []))) for name in unread]
    return [(name, meant) for name, meant in found if meant is not None]


def _meant(name: str, known: Iterable[str]) -> str | None:
    similar = [each for each in known if abs(len(name) - len(each)) <= 3]
    # NCCL's plugins and later versions have names of their own, which are close to its others by their beginning.
    near = difflib.get_close_matches(name.upper(), similar, n=1, cutoff=0.93 if name.startswith("NCCL_") else 0.88)
    return near[0] if near and near[0] != name else None
