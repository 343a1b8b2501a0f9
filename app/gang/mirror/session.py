"""Node 0's part in the exchange of checkpoints: asks the nodes what they have, plans, and has it carried out."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from app.gang.mirror.manifest import Manifest, fields, listed, number, read_manifest, word
from app.gang.mirror.node import in_thread, pack_orders
from app.gang.mirror.plan import Bounds, MirrorPlan, Orders, newest_entry, plan_transfers
from app.gang.mirror.sentences import duration, of_remarks, shown, size

NEIGHBOURS = 16
Ask = Callable[[int, str, Mapping[str, object]], Awaitable[Mapping[str, Any]]]
"""Asks one node: (rank, what, with what). Raises OSError if it is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Who takes part, and how to reach them."""

    ranks: Sequence[int]
    ask: Ask
    name: Callable[[int], str]
    address: Callable[[int], str]
    say: Callable[[str], None]
    """Prints on all nodes."""


@dataclass(slots=True, kw_only=True)
class Compared:
    """What one comparison found."""

    manifests: dict[int, Manifest] = field(default_factory=dict)
    """By the lowest rank of each disk."""
    offsets: dict[int, int] = field(default_factory=dict)
    """The nodes' clocks minus this one's, in nanoseconds."""
    groups: dict[int, list[int]] = field(default_factory=dict)
    """Ranks that share a disk, by the lowest."""


async def compare_only(nodes: Nodes) -> None:
    """CHECKPOINTS=own: says which node has what, where that differs."""
    try:
        compared = await _compare(nodes)
        told = who_has_what(compared.manifests, nodes.name)
        if told:
            nodes.say(f"warning: CHECKPOINT_DIR differs between nodes (CHECKPOINTS=own): {told}")
    finally:
        await _close(nodes)


async def level(nodes: Nodes, bounds: Bounds, *, second_copy: bool = False, rate: int = 0) -> bool:
    """Brings all CHECKPOINT_DIRs level; whether that changed any. For a `second_copy` only what one node alone has
    goes to one other. With a `rate`, in bytes a second, a training runs meanwhile. Raises OSError if a node is lost;
    any other failure is said, and leaves things as they are."""
    disks: list[str] = []
    try:
        compared = await _compare(nodes, background=rate > 0)
        if len(compared.manifests) < 2:
            return False
        plan = await in_thread(
            lambda: plan_transfers(compared.manifests, compared.offsets, bounds, second_copy=second_copy)
        )
        done = await _carry_out(nodes, plan, rate)
        if not second_copy:
            disks = [manifest.disk for manifest in compared.manifests.values()]
        if not rate:
            for sentence in _report(nodes, compared, plan, done, second_copy=second_copy):
                nodes.say(sentence)
        return bool(done)
    except ValueError as error:
        nodes.say(f"warning: checkpoints were not compared: protocol error ({error})")
        return False
    finally:
        await _close(nodes, disks)


async def _close(nodes: Nodes, disks: Sequence[str] = ()) -> None:
    await _ask_all(nodes, "close", {rank: {"disks": disks} for rank in nodes.ranks}, quiet=True)


async def _compare(nodes: Nodes, *, background: bool = False) -> Compared:
    """Marks, looks and lists. Only nodes that answered in time, with a folder, are part of it."""
    found = Compared()
    asked = time.time_ns()
    marks = await _ask_all(nodes, "mark", {rank: {} for rank in nodes.ranks})
    middle = (asked + time.time_ns()) // 2
    nonces = {rank: word(mark.get("nonce")) for rank, mark in marks.items()}
    found.offsets = {rank: number(mark.get("clock"), 0, 1 << 62) - middle for rank, mark in marks.items()}
    each = {rank: {"nonces": [[one, nonces[one]] for one in looked_for(rank, [*nonces])]} for rank in nonces}
    looks = await _ask_all(nodes, "look", each)
    seen = {rank: {number(other) for other in listed(look.get("sees"))} for rank, look in looks.items()}
    found.groups = sharing(seen)
    wanted = {rank: {"listed": rank in found.groups, "background": background} for rank in looks}
    lists = await _ask_all(nodes, "scan", wanted)
    if len(found.groups) > 1:
        for rank in found.groups:
            if rank in lists:
                found.manifests[rank] = await in_thread(lambda told=lists[rank]: read_manifest(told))  # type: ignore[misc]
    _tell_clones_apart(found.manifests)
    return found


def sharing(seen: Mapping[int, set[int]]) -> dict[int, list[int]]:
    """Ranks by the lowest one whose mark they see, their own included: they share its disk."""
    lowest: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    for rank in sorted(seen):
        lowest[rank] = min((lowest[other] for other in seen[rank] if other in lowest), default=rank)
        groups.setdefault(lowest[rank], []).append(rank)
    return groups


def looked_for(rank: int, ranks: Sequence[int]) -> list[int]:
    """Whose marks a node looks for: node 0's, its own, and those of the nodes before it in the list, of which it
    suffices to see one of a disk. All marks on each of 1,000 nodes would be a million looks."""
    place = ranks.index(rank)
    return sorted({ranks[0], *ranks[max(0, place - NEIGHBOURS) : place + 1]})


def _tell_clones_apart(manifests: dict[int, Manifest]) -> None:
    """Two disks with one id are copies of one another: only the first has the id, so that nobody obeys the other."""
    known = set[str]()
    for rank, manifest in sorted(manifests.items()):
        if manifest.disk in known:
            manifests[rank] = replace(manifest, disk=f"{manifest.disk}/{rank}")
        known.add(manifest.disk)


async def _carry_out(nodes: Nodes, plan: MirrorPlan, rate: int) -> dict[int, Mapping[str, Any]]:
    busy = [rank for rank, orders in plan.orders.items() if orders != Orders()]
    if not busy:
        return {}
    key = secrets.token_hex(16)
    each = {rank: {"key": key, "background": rate > 0} for rank in sorted(plan.sources)}
    served = await _ask_all(nodes, "serve", each)
    sources = [[rank, nodes.address(rank), number(told.get("port"), 1, 65535)] for rank, told in served.items()]
    wanted = {
        rank: {"orders": pack_orders(plan.orders[rank]), "sources": sources, "key": key, "rate": rate} for rank in busy
    }
    return await _ask_all(nodes, "fetch", wanted)


async def _ask_all(
    nodes: Nodes, op: str, each: Mapping[int, Mapping[str, object]], *, quiet: bool = False
) -> dict[int, Mapping[str, Any]]:
    """The answers of those that had no problem. Raises OSError if a node is lost."""
    answers = await asyncio.gather(*(nodes.ask(rank, op, told) for rank, told in each.items()), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not quiet:
            raise answer
    found = {rank: fields(answer) for rank, answer in zip(each, answers, strict=True) if isinstance(answer, Mapping)}
    for rank, answer in found.items():
        if answer.get("problem") and not quiet:
            nodes.say(f"warning: checkpoints of {nodes.name(rank)} are left alone: {shown(str(answer['problem']))}")
    return {rank: answer for rank, answer in found.items() if "problem" not in answer}


def _report(
    nodes: Nodes, compared: Compared, plan: MirrorPlan, done: Mapping[int, Mapping[str, Any]], *, second_copy: bool
) -> list[str]:
    told = of_remarks(plan.remarks, nodes.name)
    incomplete = {rank for one in plan.remarks if one.kind in ("over_limit", "disk_full") for rank in one.ranks}
    for rank, answer in sorted(done.items()):
        files, bytes_ = number(answer.get("arrived")), number(answer.get("bytes"))
        if files:
            tops = list(dict.fromkeys(one.entry.top for one in plan.orders[rank].fetch))
            names = ", ".join(map(shown, tops[:3])) + (f" and {len(tops) - 3} more" if len(tops) > 3 else "")
            seconds = float(answer.get("seconds") or 0)
            count = f"{files} file{'' if files == 1 else 's'}"
            told.append(f"checkpoints: {nodes.name(rank)} got {names} ({count}, {size(bytes_)}) in {duration(seconds)}")
        if failures := number(answer.get("failures")):
            path, why = (shown(str(one)) for one in listed(answer.get("failed"))[0])
            more = f" (and {failures - 1} more)" if failures > 1 else ""
            told.append(f"warning: checkpoints: {nodes.name(rank)} did not get {path}{more}: {why}")
            incomplete.add(rank)
    incomplete |= {rank for rank, orders in plan.orders.items() if orders.fetch and rank not in done}
    if incomplete and not second_copy:
        told.append(
            "warning: nodes may resume from different checkpoints. Before this round, "
            f"{who_has_what(compared.manifests, nodes.name) or 'all had the same newest one'}"
        )
    return told


def who_has_what(manifests: Mapping[int, Manifest], name: Callable[[int], str]) -> str:
    """The newest entry of each node, where not all have the same; "" where they have."""
    newest = {rank: newest_entry(manifest) for rank, manifest in sorted(manifests.items())}
    if len(set(newest.values())) < 2:
        return ""
    told = []
    for rank, (top, version) in [*newest.items()][:8]:
        written = time.strftime("%H:%M:%S UTC", time.gmtime(version.mtime_ns / 1e9)) if version else ""
        told.append(f"{name(rank)} has {shown(top)} of {written}" if top else f"{name(rank)} has none")
    return "; ".join(told) + (f"; and {len(newest) - 8} more" if len(newest) > 8 else "")
