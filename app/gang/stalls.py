"""Sentences about a job in which no rank makes progress, made of what each rank's watchdog has written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.engine.outcome import Collective, Stall

NAMED = 4
"""Lines of a verdict that name ranks one by one; a large job has many."""
SAME_DATA = ("all_reduce", "allreduce", "broadcast", "reduce", "barrier", "all_gather", "allgather", "reduce_scatter")
"""Collectives in which every rank puts in as much, by the beginnings of their names; others may be uneven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered:
    """One rank and the collective of a group that it has entered."""

    stall: Stall
    collective: Collective


def describe(nodes: Mapping[str, Sequence[Stall]]) -> str:
    """Which rank has not reached which collective, from all ranks of all nodes (by the nodes' names)."""
    stalls = sorted((stall for each in nodes.values() for stall in each), key=lambda stall: stall.rank)
    where = {stall.rank: name for name, each in nodes.items() for stall in each}
    seconds = min(stall.seconds for stall in stalls if not stall.ended)
    told = _mismatch(stalls) or _missing(stalls, where) or _all_blocked(stalls) or _each(stalls, where)
    return f"no progress on any rank for {seconds} s: {told}"


def _mismatch(stalls: Sequence[Stall]) -> str:
    """The first collective of a group that is not the same on all ranks; "" for none."""
    for numbered in _by_number(stalls).values():
        if all(entry.collective.done for entry in numbered):
            continue
        names, data = _split(numbered, by_name=True), _split(numbered, by_name=False)
        if len(names) > 1:
            firsts = [(_ranks(entries), entries[0]) for entries in names]
            told = [f"{who} {_called(first.collective)} at {_place(first.stall)}" for who, first in firsts]
            return f"the ranks entered different collectives: {_few(told)}"
        if len(data) > 1 and numbered[0].collective.name.startswith(SAME_DATA):
            # The odd ones first.
            data.sort(key=len)
            told = [f"{_ranks(entries)} with {entries[0].collective.data}" for entries in data]
            called = _called(numbered[0].collective)
            odd = data[0][0].stall
            told = [f"the ranks entered {called} with different data: {_few(told)}. rank {odd.rank} is at {odd.at}"]
            if missing := [stall for stall in stalls if _has_not_reached(stall, numbered[0].collective)]:
                told.append(f"{_stalled(missing)} {_have(missing)} not reached it")
            return "; ".join(told)
    return ""


def _split(entries: Sequence[Entered], *, by_name: bool) -> list[list[Entered]]:
    found: dict[str, list[Entered]] = {}
    for entry in entries:
        found.setdefault(entry.collective.name if by_name else entry.collective.data, []).append(entry)
    return list(found.values())


def _by_number(stalls: Sequence[Stall]) -> dict[tuple[str, int], list[Entered]]:
    """Who has entered which collective, the oldest first."""
    found: dict[tuple[str, int], list[Entered]] = {}
    for stall in stalls:
        for one in stall.entered:
            found.setdefault((one.group, one.sequence), []).append(Entered(stall=stall, collective=one))
    return {key: found[key] for key in sorted(found, key=lambda key: key[1])}


def _missing(stalls: Sequence[Stall], where: Mapping[int, str]) -> str:
    """Ranks that others wait for; "" for none."""
    waits = []
    for entries in _by_number(stalls).values():
        blocked = [entry for entry in entries if not entry.collective.done]
        missing = [stall for stall in stalls if _has_not_reached(stall, entries[0].collective)]
        if blocked and missing:
            waits.append((blocked, missing))
    if not waits:
        return ""
    # Where one waits for another that waits for a third, the third is the cause.
    waiting = {entry.stall.rank for blocked, _ in waits for entry in blocked}
    blocked, missing = min(waits, key=lambda wait: sum(stall.rank in waiting for stall in wait[1]))
    one = blocked[0]
    it, verb = _called(one.collective), "is" if len(blocked) == 1 else "are"
    if all(stall.ended for stall in missing):
        has, last = _have(missing), _last(missing[0])
        after = f" after {_called(last)}" if last else ""
        told = (
            f"{_stalled(missing)} {has} ended{after}, while {_ranks(blocked)} {verb} blocked in {it} at {one.stall.at}"
        )
        return f"{told}: unequal numbers of batches or steps?"
    has = _have(missing)
    told = f"{_stalled(missing)} {has} not reached {it}; {_ranks(blocked)} {verb} blocked in it at {one.stall.at}. "
    return told + _few([f"rank {stall.rank} on {where[stall.rank]} {_state(stall)}" for stall in missing])


def _has_not_reached(stall: Stall, collective: Collective) -> bool:
    own = [one.sequence for one in stall.entered if one.group == collective.group]
    if own:
        return max(own) < collective.sequence
    # Who has entered nothing of another group than everybody's may not belong to it.
    return collective.default_group


def _all_blocked(stalls: Sequence[Stall]) -> str:
    """All have entered the same; "" if they have not."""
    last = [one for stall in stalls if (one := _last(stall))]
    if len(last) < len(stalls) or len({(one.group, one.sequence) for one in last}) > 1 or all(one.done for one in last):
        return ""
    told = f"all ranks are blocked in {_called(last[0])}; rank {stalls[-1].rank} is at {_place(stalls[-1])}. Either "
    told += "their data does not arrive (`doctor` on all nodes tests the network), or they wait for something else "
    return told + "(see the stacks)"


def _each(stalls: Sequence[Stall], where: Mapping[int, str]) -> str:
    told = []
    for one in stalls:
        last = _last(one)
        entered = f"has entered {_called(last)}" if last else "has entered no collective"
        told.append(f"rank {one.rank} on {where[one.rank]} {entered}, {_state(one)}")
    return _few(told)


def _last(stall: Stall) -> Collective | None:
    """The newest; one without a number stands for a group that the rank has not used yet."""
    return next((one for one in reversed(stall.entered) if one.sequence), None)


def _have(stalls: Sequence[Stall]) -> str:
    return "has" if len(stalls) == 1 else "have"


def is_blocked(stall: Stall) -> bool:
    """Whether it waits in a collective: what it dies of later, torch's time-out for one, is a consequence."""
    return any(not one.done for one in stall.entered)


def is_free(stall: Stall) -> bool:
    """Whether it is known to wait in no collective: it has used some, and all are done."""
    return _last(stall) is not None and not is_blocked(stall)


def _called(one: Collective) -> str:
    """`all_reduce #6`; of another group than everybody's with its name."""
    named, _, description = one.group.rpartition(":")
    name = description if description != "undefined" else named.rpartition(":")[2]
    group = "" if one.default_group else f" of process group {name}"
    return f"{one.name} #{one.sequence}{group}"


def _state(stall: Stall) -> str:
    return "has ended" if stall.ended else f"is at {stall.at}"


def _place(stall: Stall) -> str:
    return stall.at or "the end of the script"


def _few(told: Sequence[str]) -> str:
    return "; ".join(told[:NAMED]) + (f"; and {len(told) - NAMED} more" if len(told) > NAMED else "")


def _ranks(entries: Sequence[Entered]) -> str:
    return _stalled([entry.stall for entry in entries])


def _stalled(stalls: Sequence[Stall]) -> str:
    """`rank 2`, `ranks 0, 1, 3`; a long list by its ends."""
    numbers = [str(stall.rank) for stall in stalls]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 8:
        return f"{len(numbers)} ranks ({numbers[0]} to {numbers[-1]})"
    return f"ranks {', '.join(numbers)}"
