"""A job in which no rank moves: what each rank's watch has written (stall.py), and one sentence made of all of them."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.launch.plan import Plan

IDLE = 0.02
"""BUSY of stall.py."""
NAMED = 4
"""Lines of a verdict that name ranks one by one; a large job has many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """One rank that stands still."""

    rank: int
    seconds: int
    """For how long, when it was told."""
    at: str
    """`train.py:18, in train: dist.all_reduce(loss)`: the script's own line."""
    collective: str = ""
    """The last one that this rank has entered, "" for none yet."""
    group: str = ""
    sequence: int = -1
    """Its number in its group."""
    run_id: str = ""
    """Of its round, "" where that is not known."""

    @property
    def entered(self) -> str:
        return f"{self.collective} (number {self.sequence})" if self.collective else "no collective"


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """A rank's last sign of life, and since when it has used no processor."""

    sign: int
    """When it was left, in nanoseconds."""
    since: float
    used: float
    """Seconds of processor time until then."""


def folder(plan: Plan) -> Path:
    """Where this node's ranks tell, and keep their stacks for the report."""
    return plan.run_dir / "report" / f"node{plan.node_rank}" / "stalls"


def watched(plan: Plan) -> dict[str, str]:
    """What the workers of a new round must know for stall.py to watch them; empties the folder for them."""
    patience = _patience(plan)
    if not patience:
        return {}
    for file in (*folder(plan).glob("rank*"), *signs().glob("rank*")):
        # What was told of an earlier round; one that cannot be removed must not keep this round from its start.
        with contextlib.suppress(OSError):
            file.unlink()
    with contextlib.suppress(OSError):
        signs().mkdir(mode=0o700, exist_ok=True)
    return {"TORCHRUN_COMPOSE_STALLS": f"{patience:g}:{folder(plan)}", "TORCHRUN_COMPOSE_LOOKS": str(signs())}


def signs() -> Path:
    """Where the ranks of this launcher leave a sign of life every few seconds: not on a disk, which may hang itself."""
    return Path(tempfile.gettempdir()) / f"torchrun-compose-looks-{os.getpid()}"


def forget_signs() -> None:
    """At the end of this launcher."""
    shutil.rmtree(signs(), ignore_errors=True)


def _patience(plan: Plan) -> float:
    return min((seconds for seconds in (plan.hang_report, plan.hang_timeout) if seconds), default=0.0)


def read_stalls(plan: Plan, silences: dict[int, Silence]) -> tuple[Stall, ...]:
    """This node's ranks if all of them stand still, in rank order; () as long as one moves. Never raises OSError.

    `silences` is the caller's to keep from look to look, empty at first."""
    found = {}
    try:
        for file in folder(plan).glob("rank*.json"):
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
    return tuple(found[rank] for rank in sorted(found)) if len(found) == plan.nproc else ()


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


def verdict(nodes: Mapping[str, Sequence[Stall]]) -> str:
    """Which rank did not enter which collective, from all ranks of all nodes (by the nodes' names)."""
    stalls = sorted((stall for each in nodes.values() for stall in each), key=lambda stall: stall.rank)
    where = {stall.rank: name for name, each in nodes.items() for stall in each}
    last = max(stalls, key=lambda stall: stall.sequence)
    ahead = [stall for stall in stalls if (stall.group, stall.sequence) == (last.group, last.sequence)]
    behind = [stall for stall in stalls if stall.sequence < last.sequence and stall.group in (last.group, "")]
    names = dict.fromkeys(stall.collective for stall in ahead)
    if behind:
        wait = "waits" if len(ahead) == 1 else "wait"
        told = f"{_ranks(behind)} did not enter {last.entered}, where {_ranks(ahead)} {wait} at {last.at}. "
        told += _few([f"rank {one.rank} on {where[one.rank]} is at {one.at}" for one in behind])
    elif len(names) > 1:
        groups = [[stall for stall in ahead if stall.collective == name] for name in names]
        told = "the ranks entered different collectives: "
        told += _few([f"{_ranks(group)} {group[0].entered} at {group[0].at}" for group in groups])
    elif last.collective and len(ahead) == len(stalls):
        told = f"all ranks have entered {last.entered}; rank {last.rank} is at {last.at}. Either their data does not "
        told += "arrive (`doctor` on all nodes tries the network), or they wait for something else (the stacks tell)"
    else:
        told = _few([f"rank {one.rank} on {where[one.rank]} entered {one.entered}, is at {one.at}" for one in stalls])
    return f"no rank has moved for {min(stall.seconds for stall in stalls)} s: {told}"


def _few(told: Sequence[str]) -> str:
    return "; ".join(told[:NAMED]) + (f"; and {len(told) - NAMED} more" if len(told) > NAMED else "")


def _ranks(stalls: Sequence[Stall]) -> str:
    """`rank 2`, `ranks 0, 1 and 3`; a long list by its ends."""
    numbers = [str(stall.rank) for stall in stalls]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 8:
        return f"{len(numbers)} ranks ({numbers[0]} to {numbers[-1]})"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"
