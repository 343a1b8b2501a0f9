"""What of the nodes' checkpoints is exchanged before a round."""

import re

from app.config.settings import Settings
from app.plan.decisions import Ledger
from app.plan.parts import Checkpoints

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def decide_checkpoints(settings: Settings, nodes: int, ledger: Ledger) -> Checkpoints:
    """Records how checkpoints are exchanged; on one node nothing is."""
    several = nodes > 1
    level = settings.text("CHECKPOINTS") == "mirror"
    for name, reason in (
        ("CHECKPOINTS", "each node gets the others' newest before a round" if level else "each node has its own"),
        ("MIRROR_KEEP", "newest entries of CHECKPOINT_DIR that every node gets"),
        ("MIRROR_LIMIT", "most that one node gets before a round"),
    ):
        value = settings.get(name)
        if value is not None and (settings.is_set(name) or (several and name == "CHECKPOINTS")):
            ledger.take(name, value, reason)
    keep = settings.text("MIRROR_KEEP")
    return Checkpoints(
        mirror=several and level,
        keep=None if keep == "all" else int(keep),
        limit=byte_count(settings.text("MIRROR_LIMIT")),
    )


def byte_count(text: str) -> int:
    """`100GB` as a number of bytes; 0 for a text that is none."""
    found = re.fullmatch(r"([0-9]{1,6})([KMGT]?)B?", text)
    return int(found[1]) * UNITS[found[2]] if found else 0
