"""A job in which no rank moves: what each rank's watch has written (stall.py), and one sentence made of all of them."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.launch.plan import Plan

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

    @property
    def entered(self) -> str:
        return f"{self.collective} (number {self.sequence})" if self.collective else "no collective"


def folder(plan: Plan) -> Path:
    """Where this node's ranks tell, and keep their stacks for the report."""
    return plan.run_dir / "report" / f"node{plan.node_rank}" / "stalls"


def watched(plan: Plan) -> dict[str, str]:
    """What the workers of a new round must know for stall.py to watch them; empties the folder for them."""
    patience = min((seconds for seconds in (plan.hang_report, plan.hang_timeout) if seconds), default=0.0)
    if not patience:
        return {}
    for file in folder(plan).glob("rank*"):
        # What was told of an earlier round; one that cannot be removed must not keep this round from its start.
        with contextlib.suppress(OSError):
            file.unlink()
    return {"TORCHRUN_COMPOSE_STALLS": f"{patience:g}:{folder(plan)}"}


def read_stalls(plan: Plan) -> tuple[Stall, ...]:
    """This node's ranks if all of them stand still, in rank order; () as long as one moves. Never raises OSError."""
    found = []
    try:
        for file in folder(plan).glob("rank*.json"):
            fields = json.loads(file.read_text(encoding="utf-8"))
            del fields["stack"]
            found.append(Stall(**{**fields, "seconds": int(fields["seconds"])}))
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return tuple(sorted(found, key=lambda stall: stall.rank)) if len(found) == plan.nproc else ()


def verdict(nodes: Mapping[str, Sequence[Stall]]) -> str:
    """Which rank did not enter which collective, from all ranks of all nodes (by the nodes' names)."""
    stalls = sorted((stall for each in nodes.values() for stall in each), key=lambda stall: stall.rank)
    where = {stall.rank: name for name, each in nodes.items() for stall in each}
    last = max(stalls, key=lambda stall: stall.sequence)
    ahead = [stall for stall in stalls if (stall.group, stall.sequence) == (last.group, last.sequence)]
    behind = [stall for stall in stalls if stall.sequence < last.sequence and stall.group in (last.group, "")]
    names = dict.fromkeys(stall.collective for stall in ahead)
    if behind:
        told = f"{_ranks(behind)} did not enter {last.entered}, where {_ranks(ahead)} wait at {last.at}. "
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
