"""A job in which no rank makes progress: what each rank's watchdog has written (watchdog.py)."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from app.engine.outcome import Collective, Stall
from app.engine.watchdog import BUSY, Activity, activity
from app.plan import Plan

KEPT = 8
"""Collectives of a rank."""
HOLDS_THE_GIL = "native code holding the GIL (no Python stack)"


@dataclass(frozen=True, slots=True, kw_only=True)
class StalledHeartbeat:
    """A rank's last heartbeat, and since when it has used no processor."""

    beat: int
    """When it was written, in nanoseconds."""
    since: float
    seconds: float
    """Of processor time until then, of the rank and all below it."""


def watched(plan: Plan, folder: Path) -> dict[str, str]:
    """What the workers of a new round must know for watchdog.py to watch them (after 0 seconds: it tells stacks alone),
    and to leave an error that a full disk does not take; empties their `folder`."""
    for file in folder.glob("rank*"):
        with contextlib.suppress(OSError):
            file.unlink()
    return {"TORCHRUN_COMPOSE_STALLS": f"{_patience(plan):g}:{folder}"}


def _patience(plan: Plan) -> float:
    return min((seconds for seconds in (plan.timeouts.hang_report, plan.timeouts.hang_timeout) if seconds), default=0.0)


def keep_stalls(plan: Plan, folder: Path) -> None:
    """Copies what the ranks have written to the report, with their stacks. Raises OSError."""
    plan.stall_dir.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("rank*.json"):
        with contextlib.suppress(FileNotFoundError):
            target = plan.stall_dir / file.name
            shutil.copyfile(file, target)
            target.chmod(0o600)


def forget_stalls(plan: Plan) -> None:
    """Of a round that is over, or that makes progress again. Raises OSError."""
    for file in plan.stall_dir.glob("rank*"):
        file.unlink(missing_ok=True)


def read_stalls(
    plan: Plan,
    folder: Path,
    heartbeats: dict[int, StalledHeartbeat],
    measure: Callable[[int], Activity] = activity,
) -> tuple[Stall, ...]:
    """This node's ranks if none of them makes progress, in rank order; () as long as one does. Never raises OSError.

    `heartbeats` is the caller's to keep from call to call, empty at first. A rank that has ended makes no progress,
    but all together have. It counts once it has ended for as long as the others must stand still: a rank that waited
    for it until then needs a moment to take its own stall back."""
    found: dict[int, Stall] = {}
    try:
        for file in (*folder.glob("rank*.ended"), *folder.glob("rank*.json")):
            ended = file.suffix == ".ended"
            if ended and time.time() - file.stat().st_mtime < _patience(plan):
                continue
            stall = _read(json.loads(file.read_text(encoding="utf-8")), ended=ended)
            found.setdefault(stall.rank, stall)
        # Whoever holds the GIL cannot take its stall back.
        silent = _silent(folder, _patience(plan), heartbeats, measure)
        found |= {rank: stall for rank, stall in silent.items() if rank not in found}
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return tuple(found[rank] for rank in sorted(found)) if len(found) == plan.workers.nproc else ()


def read_ended(folder: Path) -> tuple[Stall, ...]:
    """The ranks whose script has ended, and when. Never raises OSError."""
    try:
        files = sorted(folder.glob("rank*.ended"))
        found = [(file.stat().st_mtime, json.loads(file.read_text(encoding="utf-8"))) for file in files]
        return tuple(replace(_read(fields, ended=True), time=at) for at, fields in found)
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _read(fields: Mapping[str, object], *, ended: bool) -> Stall:
    """Raises ValueError, KeyError, TypeError."""
    entered = fields["entered"] if isinstance(fields["entered"], list) else []
    return Stall(
        rank=int(str(fields["rank"])),
        seconds=int(float(str(fields["seconds"]))),
        at="" if ended else str(fields["at"]),
        entered=newest([Collective(**each) for each in entered]),
        run_id=str(fields["run_id"]),
        ended=ended,
    )


def newest(entered: Sequence[Collective]) -> tuple[Collective, ...]:
    """The last of each group, and as many of the newest as there is room for; oldest first."""
    last = {one.group: one for one in entered}
    kept = [*last.values(), *reversed(entered)]
    chosen = list(dict.fromkeys(kept))[:KEPT]
    return tuple(one for one in entered if one in chosen)


def _silent(
    folder: Path, patience: float, heartbeats: dict[int, StalledHeartbeat], measure: Callable[[int], Activity]
) -> dict[int, Stall]:
    """Ranks without a heartbeat for `patience` seconds that used no processor meanwhile. Raises OSError, ValueError for
    a process that has ended or that a person has stopped."""
    found = {}
    for file in folder.glob("rank*"):
        if file.suffix or file.with_suffix(".ended").exists():
            continue
        rank, beat, now = int(file.name.removeprefix("rank")), file.stat().st_mtime_ns, time.monotonic()
        known, done = heartbeats.get(rank), measure(int(file.read_text(encoding="ascii")))
        if done.states[0] in "ZXTt":
            heartbeats.pop(rank, None)
            raise ValueError("it has ended, or is stopped by a signal or a debugger")
        # What it computed between its last heartbeat and its silence does not count.
        if not known or known.beat != beat or done.seconds - known.seconds > BUSY * (now - known.since):
            heartbeats[rank] = StalledHeartbeat(beat=beat, since=now, seconds=done.seconds)
        elif now - known.since >= patience:
            found[rank] = Stall(rank=rank, seconds=int(now - known.since), at=HOLDS_THE_GIL)
    return found
