"""What of the nodes' checkpoints is exchanged before a round."""

from app.config.settings import Settings
from app.plan.decisions import Ledger
from app.plan.parts import CheckpointExchange


def decide_checkpoints(settings: Settings, nodes: int, ledger: Ledger) -> CheckpointExchange:
    """Records how checkpoints are exchanged; on one node nothing is."""
    wanted = settings.checkpoints
    level = wanted.value == "mirror"
    if nodes > 1 or settings.is_set("CHECKPOINTS"):
        reason = "each node gets the others' newest before a round" if level else "each node keeps its own"
        ledger.take("script", wanted, reason)
    for value, reason in (
        (settings.mirror_keep, "newest entries of CHECKPOINT_DIR that every node gets"),
        (settings.mirror_limit, "most that one node gets before a round"),
    ):
        if settings.is_set(value.name):
            ledger.take("script", value, reason)
    return CheckpointExchange(
        mirror=level and nodes > 1, keep=settings.mirror_keep.value, limit=settings.mirror_limit.value
    )
