"""What a participant tells node 0 of its workers: where they stand still, and how a round ended here."""

import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from app.engine.outcome import Explanation, Failure, Outcome, Stall
from app.gang.messages import MOST_ENTERED, MOST_RANKS, YEAR_2100


def stalls(seen: Sequence[Stall], run_id: str) -> list[Stall]:
    """What has room in a line, which are some 128 collectives."""
    # What was seen a moment ago may be of the round before.
    found = [stall for stall in seen if stall.run_id in ("", run_id)][:MOST_RANKS]
    most = max(1, min(MOST_ENTERED, 128 // max(1, len(found))))
    return [replace(stall, entered=stall.entered[-most:]) for stall in found]


def finished(seen: Sequence[Stall], run_id: str, nproc: int) -> str:
    """After which collective all ranks of this node ended by themselves; "" if not all have, or it is unknown."""
    ended = [stall for stall in seen if stall.ended and stall.run_id == run_id]
    if len(ended) < nproc:
        return ""
    entered = [one for stall in ended for one in stall.entered[-1:] if one.sequence]
    last = max(entered, key=lambda one: one.sequence, default=None)
    return f"{last.name} #{last.sequence}" if last else "no collective"


def first_failure(outcome: Outcome) -> Failure | None:
    """The first worker's, or torchrun's own; None where nothing failed by itself."""
    if not outcome.code or (outcome.halted and not outcome.failures):
        return None
    return next(iter(outcome.failures), Failure(rank=-1, exitcode=outcome.code, text="", time=time.time()))


def report(outcome: Outcome, first: Failure, found: Explanation) -> dict[str, object]:
    alike = [each for each in outcome.failures if _ended_with(first, each)]
    return {
        "rank": first.rank,
        "exitcode": clamp(first.exitcode),
        "time": max(0, min(YEAR_2100, round(first.time * 1000))),
        "halted": outcome.halted,
        "alike": max(0, len(alike) - 1),
        **asdict(found),
    }


def _ended_with(first: Failure, other: Failure) -> bool:
    """Whether the same signal has ended both at the same moment. torchrun itself ends the others by SIGTERM."""
    same = first.exitcode == other.exitcode and first.exitcode < 0 and first.exitcode != -signal.SIGTERM
    return same and abs(first.time - other.time) <= 1.0


def clamp(code: int) -> int:
    return max(-64, min(255, code))
