"""A job in which no rank moves: what each rank's watch has written (watchdog.py)."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from app.engine.outcome import Stall
from app.plan import Plan

IDLE = 0.02
"""BUSY of watchdog.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """A rank's last sign of life, and since when it has used no processor."""

    sign: int
    """When it was left, in nanoseconds."""
    since: float
    used: float
    """Seconds of processor time until then."""


def watched(plan: Plan) -> dict[str, str]:
    """What the workers of a new round must know for watchdog.py to watch them; empties the folder for them."""
    patience = _patience(plan)
    if not patience:
        return {}
    for file in (*plan.stall_dir.glob("rank*"), *signs().glob("rank*")):
        # What was told of an earlier round; one that cannot be removed must not keep this round from its start.
        with contextlib.suppress(OSError):
            file.unlink()
    with contextlib.suppress(OSError):
        signs().mkdir(mode=0o700, exist_ok=True)
    return {"TORCHRUN_COMPOSE_STALLS": f"{patience:g}:{plan.stall_dir}", "TORCHRUN_COMPOSE_LOOKS": str(signs())}


def signs() -> Path:
    """Where the ranks of this launcher leave a sign of life every few seconds: not on a disk, which may hang itself."""
    return Path(tempfile.gettempdir()) / f"torchrun-compose-looks-{os.getpid()}"


def forget_signs() -> None:
    """At the end of this launcher."""
    shutil.rmtree(signs(), ignore_errors=True)


def _patience(plan: Plan) -> float:
    return min((seconds for seconds in (plan.timeouts.hang_report, plan.timeouts.hang_timeout) if seconds), default=0.0)


def read_stalls(plan: Plan, silences: dict[int, Silence]) -> tuple[Stall, ...]:
    """This node's ranks if all of them stand still, in rank order; () as long as one moves. Never raises OSError.

    `silences` is the caller's to keep from look to look, empty at first."""
    found = {}
    try:
        for file in plan.stall_dir.glob("rank*.json"):
            fields = json.loads(file.read_text(encoding="utf-8"))
            known = {
                name: fields[name]
                for name in ("rank", "at", "collective", "group", "sequence", "run_id")
                if name in fields
            }
            found[known["rank"]] = Stall(**known, seconds=int(fields["seconds"]))
        # Whoever holds Python's lock cannot take its stall back.
        found |= {rank: mute for rank, mute in _mute(_patience(plan), silences).items() if rank not in found}
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return tuple(found[rank] for rank in sorted(found)) if len(found) == plan.workers.nproc else ()


def _mute(patience: float, silences: dict[int, Silence]) -> dict[int, Stall]:
    """Ranks that have left no sign of life for `patience` seconds and used no processor meanwhile. Raises OSError,
    ValueError for a process that has ended."""
    found = {}
    for file in signs().glob("rank*") if patience else ():
        if file.suffix:
            continue
        rank, sign, now = int(file.name.removeprefix("rank")), file.stat().st_mtime_ns, time.monotonic()
        used = _processor_time(int(file.read_text(encoding="ascii")))
        known = silences.get(rank)
        # What it computed between its last sign and its silence does not count.
        if not known or known.sign != sign or used - known.used > IDLE * (now - known.since):
            silences[rank] = Silence(sign=sign, since=now, used=used)
        elif now - known.since >= patience:
            at = "native code that holds Python's lock (no stack)"
            found[rank] = Stall(rank=rank, seconds=int(now - known.since), at=at)
    return found


def _processor_time(pid: int) -> float:
    """Seconds that all threads of a process have used (kernel: Documentation/filesystems/proc.rst)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ValueError("it has ended")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
