"""Summarizes per-rank stall records in one sentence."""

from collections.abc import Mapping, Sequence

from app.engine.outcome import Stall

NAMED = 4
"""Lines of a verdict that name ranks one by one; a large job has many."""


def describe(nodes: Mapping[str, Sequence[Stall]]) -> str:
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
