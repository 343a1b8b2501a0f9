"""Decides what the nodes exchange before a round: pure, from what each of them has.

What every node shall see is what it would see on a shared disk: all files, of two versions of one path the newest. A
copy follows its origin; what this feature did not bring is never removed; the newest version gives way only if it is
torn.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from app.gang.mirror.manifest import Entry, Manifest, Version

SMALL = 1 << 20
"""Bytes up to which a file beside the checkpoints is always brought along."""
MOST_SMALL = 1000
TOGETHER = 60 * 10**9
"""Nanoseconds within which top-level entries are one checkpoint: ranks that each save a file of their own."""
NUMBER = re.compile(r"\d+")
KEEP_FREE = 0.05
"""Share of the free disk that stays free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One version of a path that a node fetches."""

    entry: Entry
    """Its origin is the disk to remember; "" where the file becomes this node's own."""
    source: int
    """The rank that has it."""
    previous: bool = False
    """The source kept it as the generation before."""
    compare: bool = False
    """The receiver has a file of the same size: the content may be the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What one node does."""

    delete: tuple[tuple[str, Version], ...] = ()
    adopt: tuple[tuple[str, str], ...] = ()
    """Copies whose disk is lost, and the disk that is their origin from now on."""
    aside: tuple[str, ...] = ()
    """Incomplete top-level folders, to be moved out of the script's sight."""
    forget: tuple[str, ...] = ()
    """Deleted or awaited copies that nobody has any more."""
    owed: tuple[str, ...] = ()
    """Files of this node's own that it lacks and does not fetch now: that they are not here is nobody's decision."""
    fetch: tuple[Transfer, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """Something that people must know. `kind` is restored, torn, incomplete, over_limit, disk_full or kept_out."""

    kind: str
    path: str = ""
    ranks: tuple[int, ...] = ()
    size: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorPlan:
    orders: Mapping[int, Orders]
    remarks: tuple[Remark, ...] = ()

    @property
    def sources(self) -> set[int]:
        return {item.source for rank, orders in self.orders.items() for item in orders.fetch if item.source != rank}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    keep: int | None = 2
    """Newest top-level entries; None for all."""
    limit: int | None = None
    """Bytes for one node in one comparison; None for no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The version of a path that all nodes shall have."""

    entry: Entry
    at: float
    """Its time in nanoseconds of node 0's clock."""
    holders: tuple[int, ...]
    owner: int
    """The rank whose own file it is from now on."""
    previous: bool = False


def plan_transfers(
    manifests: Mapping[int, Manifest],
    offsets: Mapping[int, int],
    bounds: Bounds,
    *,
    second_copy: bool = False,
) -> MirrorPlan:
    """What each node does. `offsets` are the nodes' clocks minus node 0's, in nanoseconds.

    For a `second_copy` only what one node alone has goes to one other, of whole files only."""
    return _Planner(manifests, offsets, bounds, second_copy).plan()


class _Planner:
    """The folders of all nodes, side by side."""

    def __init__(
        self, manifests: Mapping[int, Manifest], offsets: Mapping[int, int], bounds: Bounds, second_copy: bool
    ) -> None:
        self.manifests, self.offsets, self.bounds, self.second_copy = manifests, offsets, bounds, second_copy
        self.disks: dict[str, int] = {}
        """The node of each disk that is here."""
        self.holders: dict[str, dict[int, Entry]] = defaultdict(dict)
        for rank, manifest in sorted(manifests.items()):
            self.disks.setdefault(manifest.disk, rank)
            for path, entry in manifest.entries.items():
                self.holders[path][rank] = entry
        self.remarks: list[Remark] = []
        self.choices: dict[str, Choice] = {}
        self.incomplete = self._incomplete()
        self.aside: dict[int, set[str]] = defaultdict(set)
        if not second_copy and self._disks_changed():
            self._set_aside()
        self.deleted = self._deletions()
        self.latest = self._latest_writers()

    def plan(self) -> MirrorPlan:
        for path in sorted(self.holders):
            if choice := self._choose(path):
                self.choices[path] = choice
        kept = kept_entries(self.choices.values(), self.bounds.keep)
        orders = {rank: self._orders(rank, kept) for rank in self.manifests}
        self._remark_kept_out(kept)
        return MirrorPlan(orders=orders, remarks=tuple(self.remarks))

    def at(self, rank: int, entry: Entry) -> float:
        """When it was written, by node 0's clock: a copy has the time of the disk it came from."""
        clock = self.disks.get(entry.origin) if entry.origin else rank
        return entry.version.mtime_ns - (self.offsets.get(clock, 0) if clock is not None else 0)

    def _disks_changed(self) -> bool:
        """Whether other disks are here than at the last comparison, as far as one of them remembers."""
        present = {manifest.disk for manifest in self.manifests.values()}
        return any(manifest.peers and manifest.peers != present for manifest in self.manifests.values())

    def _incomplete(self) -> set[str]:
        """Numbered folders that lack files which an older one of their kind has, and have none that it lacks."""
        names: dict[str, set[str]] = defaultdict(set)
        newest: dict[str, float] = defaultdict(float)
        for path, holders in self.holders.items():
            top, _, rest = path.partition("/")
            if rest and not temporary(top) and NUMBER.search(top):
                names[top].add(rest)
                newest[top] = max(newest[top], *(self.at(rank, entry) for rank, entry in holders.items()))
        kinds: dict[str, list[str]] = defaultdict(list)
        for top in sorted(names, key=lambda top: (newest[top], top)):
            kinds[NUMBER.sub("", top)].append(top)
        return {
            top
            for tops in kinds.values()
            for index, top in enumerate(tops)
            if any(names[older] > names[top] for older in tops[:index])
        }

    def _set_aside(self) -> None:
        """A checkpoint of several nodes lacks what was on a lost disk: a script would choose it, as the newest, and
        fail, though there is a whole one before it."""
        for path in [path for path in self.holders if path.partition("/")[0] in self.incomplete]:
            for rank in self.holders.pop(path):
                self.aside[rank].add(path.partition("/")[0])
        for top in sorted(self.incomplete):
            ranks = tuple(rank for rank, tops in self.aside.items() if top in tops)
            self.remarks.append(Remark(kind="incomplete", path=top, ranks=ranks))

    def _deletions(self) -> dict[int, dict[str, Version]]:
        """Copies whose origin is here and no longer has them.

        An emptied disk is filled, not obeyed: where less is left on it than half of what vanished, nobody follows."""
        vanished: dict[int, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
        copies: list[tuple[int, int, Entry]] = []
        for path, holders in self.holders.items():
            for rank, entry in holders.items():
                origin = self.disks.get(entry.origin) if entry.origin else None
                if origin is None or origin in holders or _may_have(self.manifests[origin], path):
                    continue
                vanished[origin][entry.top][path] = entry.version.size
                copies.append((origin, rank, entry))
        left = {
            rank: sum(entry.version.size for entry in self.manifests[rank].entries.values() if not entry.origin)
            for rank in vanished
        }
        found: dict[int, dict[str, Version]] = defaultdict(dict)
        for origin, rank, entry in copies:
            if 2 * left[origin] >= sum(vanished[origin][entry.top].values()) and left[origin]:
                found[rank][entry.path] = entry.version
        return found

    def _latest_writers(self) -> dict[str, list[int]]:
        """For each top-level folder, the nodes with files of their own in it, the last to write first: where several
        wrote the same paths, all of these come from one of them, or parts of two checkpoints would be mixed."""
        newest: dict[str, dict[int, float]] = defaultdict(dict)
        for path, holders in self.holders.items():
            for rank, entry in holders.items():
                if "/" in path and self._is_candidate(path, rank, entry):
                    at = self.at(rank, entry)
                    newest[entry.top][rank] = max(at, newest[entry.top].get(rank, at))
        return {top: sorted(ranks, key=lambda rank: (-ranks[rank], rank)) for top, ranks in newest.items()}

    def _is_candidate(self, path: str, rank: int, entry: Entry) -> bool:
        """Whether an entry speaks for itself: a node's own file, or a copy of one that nobody has any more."""
        if not entry.origin:
            return True
        if self.disks.get(entry.origin, -1) in self.holders[path]:
            return False
        return path not in self.deleted.get(rank, {})

    def _choose(self, path: str) -> Choice | None:
        """The version of `path` for all, None if it is to disappear or, for a second copy, is not worth one."""
        holders = self.holders[path]
        candidates = [rank for rank, entry in holders.items() if self._is_candidate(path, rank, entry)]
        # Copies of each other, with no file of anybody's own, cannot be; if they are, they stay.
        candidates = candidates or [rank for rank in holders if path not in self.deleted.get(rank, {})]
        if not candidates:
            return None
        order = self.latest.get(path.partition("/")[0], []) if "/" in path else []
        place = {rank: -index for index, rank in enumerate(order)}

        def worth(rank: int) -> tuple[bool, int, float, int]:
            return not holders[rank].torn, place.get(rank, -len(order)), self.at(rank, holders[rank]), -rank

        best = max(candidates, key=worth)
        entry = holders[best]
        same = [rank for rank, other in holders.items() if _same(other, entry)]
        owners = [rank for rank in same if not holders[rank].origin]
        # A copy whose disk is lost: the node of rank 0 most likely goes on writing there.
        owner = min(owners) if owners else self.disks.get(entry.origin, min(self.manifests))
        newest = max(candidates, key=lambda rank: self.at(rank, holders[rank]))
        whole = None
        if holders[newest].torn:
            if self.second_copy:
                return None
            whole = self._whole_one(path, newest)
        return whole or Choice(entry=entry, at=self.at(best, entry), holders=tuple(same), owner=owner)

    def _whole_one(self, path: str, torn: int) -> Choice | None:
        """The newest whole version of a path whose newest version is torn, be it a copy or the generation before."""
        found = [
            (self.at(rank, kept[path]), not previous, -rank)
            for rank, manifest in self.manifests.items()
            for previous, kept in ((False, manifest.entries), (True, manifest.previous))
            if path in kept and not kept[path].torn and not kept[path].link
        ]
        if not found:
            self.remarks.append(Remark(kind="torn", path=path, ranks=(torn,)))
            return None
        at, current, source = max(found)
        manifest = self.manifests[-source]
        entry = (manifest.entries if current else manifest.previous)[path]
        self.remarks.append(Remark(kind="restored", path=path, ranks=(torn, -source), size=entry.version.size))
        same = [rank for rank, other in self.holders[path].items() if current and _same(other, entry)]
        return Choice(entry=entry, at=at, holders=tuple(same or [-source]), owner=torn, previous=not current)

    def _orders(self, rank: int, kept: Sequence[str]) -> Orders:
        manifest, delete = self.manifests[rank], self._delete(rank)
        wanted: dict[str, list[Transfer]] = defaultdict(list)
        ignored = _deleted_here(manifest)
        for path, choice in self.choices.items():
            mine = manifest.entries.get(path)
            have = _same(mine, choice.entry) if mine else ignored.get(path) == choice.entry.version
            if have or (self.second_copy and not self._is_second_copy(rank, choice)):
                continue
            restores = choice.previous or (mine and mine.torn and not choice.entry.torn)
            wanted[choice.entry.top if not restores else ""].append(self._transfer(rank, choice, mine))
        fetch = wanted.pop("", [])
        room = int(manifest.free * (1 - KEEP_FREE)) + sum(version.size for version in dict(delete).values())
        room -= sum(item.entry.stored for item in fetch)
        allowed = self.bounds.limit
        for top in filter(wanted.get, kept):
            size = sum(item.entry.stored for item in wanted[top])
            if size > room or (allowed is not None and size > allowed):
                kind = "disk_full" if size > room else "over_limit"
                self.remarks.append(Remark(kind=kind, path=top, ranks=(rank,), size=size))
                continue
            room -= size
            allowed = None if allowed is None else allowed - size
            fetch += wanted.pop(top)
        return Orders(
            delete=delete,
            adopt=self._adopt(rank),
            aside=tuple(sorted(self.aside[rank])),
            forget=tuple(path for path in (*manifest.gone, *manifest.awaited) if path not in self.holders),
            owed=tuple(item.entry.path for items in wanted.values() for item in items if not item.entry.origin),
            fetch=tuple(fetch),
        )

    def _delete(self, rank: int) -> tuple[tuple[str, Version], ...]:
        gone = [item for item in self.deleted.get(rank, {}).items() if item[0] not in self.choices]
        if not self.second_copy:
            return tuple(gone)
        # A script may remove the old before it writes the new: while it trains, a copy goes once this node has a newer.
        entries, newest = self.manifests[rank].entries, dict[str, float]()
        lacking = {path.partition("/")[0] for path, holders in self.holders.items() if rank not in holders}
        for choice in self.choices.values():
            top = choice.entry.top
            if not choice.entry.torn and not temporary(top) and top not in lacking | self.incomplete:
                newest[choice.entry.top] = max(choice.at, newest.get(choice.entry.top, choice.at))

        def is_outdated(entry: Entry) -> bool:
            return any(at > self.at(rank, entry) for top, at in newest.items() if top != entry.top)

        return tuple((path, version) for path, version in gone if is_outdated(entries[path]))

    def _adopt(self, rank: int) -> tuple[tuple[str, str], ...]:
        """Copies whose disk is lost follow the node that has the file as its own, as soon as there is one."""
        found = list[tuple[str, str]]()
        for path, choice in self.choices.items():
            mine, theirs = (self.holders[path].get(one) for one in (rank, choice.owner))
            if not mine or not mine.origin or mine.origin in self.disks or not _same(mine, choice.entry):
                continue
            if choice.owner == rank:
                found.append((path, ""))
            elif theirs and not theirs.origin and _same(theirs, choice.entry):
                found.append((path, self.manifests[choice.owner].disk))
        return tuple(found)

    def _transfer(self, rank: int, choice: Choice, mine: Entry | None) -> Transfer:
        # Nodes that have it share the work; a node of its own has nothing to send.
        source = rank if rank in choice.holders else choice.holders[rank % len(choice.holders)]
        entry, theirs = choice.entry, self.holders[choice.entry.path].get(choice.owner)
        # Where the owner is still to get it, which may fail, this is a copy of a lost disk until then.
        origin = self.manifests[choice.owner].disk if theirs and not theirs.origin else entry.origin
        return Transfer(
            entry=replace(entry, origin="" if choice.owner == rank else origin, torn=False),
            source=source,
            previous=choice.previous,
            compare=bool(mine and not mine.link and mine.version.size == entry.version.size),
        )

    def _is_second_copy(self, rank: int, choice: Choice) -> bool:
        """Whether this node is the one that keeps a copy of what only one node has: the next in the list."""
        ranks = sorted(self.manifests)
        following = ranks[(ranks.index(choice.holders[0]) + 1) % len(ranks)]
        return len(choice.holders) == 1 and rank == following and not choice.entry.torn

    def _remark_kept_out(self, kept: Sequence[str]) -> None:
        """Older top-level entries that not all nodes have, and that stay where they are."""
        inside, sizes = set(kept), defaultdict[str, int](int)
        for choice in self.choices.values():
            top = choice.entry.top
            if top not in inside and not temporary(top) and len(choice.holders) < len(self.manifests):
                sizes[top] += choice.entry.version.size
        if sizes and not self.second_copy:
            remark = Remark(kind="kept_out", path=max(sizes), size=sum(sizes.values()), count=len(sizes))
            self.remarks.append(remark)


def _may_have(manifest: Manifest, path: str) -> bool:
    """Whether the absence of a path says nothing."""
    return manifest.left_out > 0 or path in manifest.awaited


def _same(one: Entry, other: Entry) -> bool:
    # A link has no content beside its text, and its time is that of its making on each node.
    return one.link == other.link and (bool(one.link) or one.version == other.version)


def temporary(name: str) -> bool:
    """Whether a top-level entry is what a writer has not finished, or hides."""
    return name.startswith(".") or "tmp" in name or name.endswith((".new", ".partial"))


def kept_entries(choices: Iterable[Choice], keep: int | None) -> list[str]:
    """The top-level entries that a resume needs, the newest first: `keep` of them and those written together with the
    newest, where links point, and the small files beside them."""
    newest: dict[str, float] = {}
    small: dict[str, float] = {}
    targets = set[str]()
    for choice in choices:
        entry = choice.entry
        if temporary(entry.top):
            continue
        if "/" not in entry.path and (entry.link or entry.version.size <= SMALL):
            small[entry.top] = choice.at
            targets |= {entry.link.strip("./").partition("/")[0]} if entry.link else set()
        else:
            newest[entry.top] = max(choice.at, newest.get(entry.top, choice.at))
    ordered = sorted(newest, key=lambda top: (-newest[top], top))
    last = newest[ordered[0]] if ordered else 0.0
    chosen = [
        top
        for index, top in enumerate(ordered)
        if keep is None or index < keep or newest[top] >= last - TOGETHER or top in targets
    ]
    beside = sorted(small, key=lambda top: (-small[top], top))
    return [*(beside if keep is None else beside[:MOST_SMALL]), *chosen]


def _deleted_here(manifest: Manifest) -> dict[str, Version]:
    """Copies that a script deleted on this node, and that shall not come back; none of an emptied disk."""
    left = sum(entry.version.size for entry in manifest.entries.values())
    sizes: dict[str, int] = defaultdict(int)
    for path, copy in manifest.gone.items():
        sizes[path.partition("/")[0]] += copy.version.size
    return {
        path: copy.version for path, copy in manifest.gone.items() if left and 2 * left >= sizes[path.partition("/")[0]]
    }


def newest_entry(manifest: Manifest) -> tuple[str, Version | None]:
    """The newest top-level entry of one node, by its own clock, and the newest version in it; "" for none."""
    entries = [one for one in manifest.entries.values() if not temporary(one.top) and not one.link]
    large = [one for one in entries if one.version.size > SMALL or "/" in one.path]
    newest = max(large or entries, key=lambda one: (one.version.mtime_ns, one.path), default=None)
    return (newest.top, newest.version) if newest else ("", None)
