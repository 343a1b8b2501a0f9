"""Decides what the nodes exchange before a round: pure, from what each of them has.

What every node shall see is what it would see on a shared disk: all files, of two versions of one path the newest. A
copy follows its origin; what this feature did not bring is never removed; the newest version gives way only if it is
torn.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from app.gang.mirror.manifest import Entry, Manifest, Version

SMALL = 1 << 20
"""Bytes up to which a file beside the checkpoints is always brought along."""
MOST_SMALL = 1000
TOGETHER = 60 * 10**9
"""Nanoseconds within which top-level entries are one checkpoint: ranks that each save a file of their own."""
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
    forget: tuple[str, ...] = ()
    """Deleted or awaited copies that nobody has any more."""
    owed: tuple[str, ...] = ()
    """Files of this node's own that it lacks and does not fetch now: that they are not here is nobody's decision."""
    fetch: tuple[Transfer, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """Something that people must know. `kind` is restored, torn, over_limit, disk_full, kept_out or differs."""

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


@dataclass(slots=True)
class _Picture:
    """The folders of all nodes, side by side."""

    manifests: Mapping[int, Manifest]
    offsets: Mapping[int, int]
    disks: dict[str, int] = field(init=False)
    """The node of each disk that is here."""
    holders: dict[str, dict[int, Entry]] = field(init=False)

    def __post_init__(self) -> None:
        self.disks = {}
        self.holders = defaultdict(dict)
        for rank, manifest in sorted(self.manifests.items()):
            self.disks.setdefault(manifest.disk, rank)
            for path, entry in manifest.entries.items():
                self.holders[path][rank] = entry

    def at(self, rank: int, entry: Entry) -> float:
        """When it was written, by node 0's clock: a copy has the time of the disk it came from."""
        clock = self.disks.get(entry.origin) if entry.origin else rank
        return entry.version.mtime_ns - (self.offsets.get(clock, 0) if clock is not None else 0)


def plan_transfers(
    manifests: Mapping[int, Manifest],
    offsets: Mapping[int, int],
    bounds: Bounds,
    *,
    second_copy: bool = False,
) -> MirrorPlan:
    """What each node does. `offsets` are the nodes' clocks minus node 0's, in nanoseconds.

    For a `second_copy` only what one node alone has goes to one other, of whole files only."""
    picture = _Picture(manifests, offsets)
    deleted = _deletions(picture)
    remarks = list[Remark]()
    choices = dict[str, Choice]()
    latest = _latest_writers(picture, deleted)
    for path in sorted(picture.holders):
        choice = _choose(picture, path, deleted, latest, remarks, second_copy=second_copy)
        if choice:
            choices[path] = choice
    kept = kept_entries(choices.values(), bounds.keep)
    orders = {
        rank: _orders(picture, rank, choices, kept, deleted.get(rank, {}), bounds, remarks, second_copy=second_copy)
        for rank in manifests
    }
    remarks += _kept_out(manifests, choices, kept, second_copy=second_copy)
    return MirrorPlan(orders=orders, remarks=tuple(remarks))


def _deletions(picture: _Picture) -> dict[int, dict[str, Version]]:
    """Copies whose origin is here and no longer has them.

    An emptied disk is filled, not obeyed: where less is left on it than half of what vanished, nobody follows."""
    vanished: dict[int, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    copies: list[tuple[int, int, Entry]] = []
    for path, holders in picture.holders.items():
        for rank, entry in holders.items():
            origin = picture.disks.get(entry.origin) if entry.origin else None
            if origin is None or origin in holders or _may_have(picture.manifests[origin], path):
                continue
            vanished[origin][entry.top][path] = entry.version.size
            copies.append((origin, rank, entry))
    left = {
        rank: sum(entry.version.size for entry in picture.manifests[rank].entries.values() if not entry.origin)
        for rank in vanished
    }
    found: dict[int, dict[str, Version]] = defaultdict(dict)
    for origin, rank, entry in copies:
        if 2 * left[origin] >= sum(vanished[origin][entry.top].values()) and left[origin]:
            found[rank][entry.path] = entry.version
    return found


def _may_have(manifest: Manifest, path: str) -> bool:
    """Whether the absence of a path says nothing."""
    return manifest.left_out > 0 or path in manifest.awaited


def _latest_writers(picture: _Picture, deleted: Mapping[int, Mapping[str, Version]]) -> dict[str, list[int]]:
    """For each top-level folder, the nodes with files of their own in it, the last to write first: where several wrote
    the same paths, all of these come from one of them, or parts of two checkpoints would be mixed."""
    newest: dict[str, dict[int, float]] = defaultdict(dict)
    for path, holders in picture.holders.items():
        for rank, entry in holders.items():
            if "/" in path and _is_candidate(picture, path, rank, entry, deleted):
                at = picture.at(rank, entry)
                newest[entry.top][rank] = max(at, newest[entry.top].get(rank, at))
    return {top: sorted(ranks, key=lambda rank: (-ranks[rank], rank)) for top, ranks in newest.items()}


def _is_candidate(
    picture: _Picture, path: str, rank: int, entry: Entry, deleted: Mapping[int, Mapping[str, Version]]
) -> bool:
    """Whether an entry speaks for itself: a node's own file, or a copy of one that nobody has any more."""
    if not entry.origin:
        return True
    origin = picture.disks.get(entry.origin)
    if origin is not None and origin in picture.holders[path]:
        return False
    return path not in deleted.get(rank, {})


def _choose(
    picture: _Picture,
    path: str,
    deleted: Mapping[int, Mapping[str, Version]],
    latest: Mapping[str, Sequence[int]],
    remarks: list[Remark],
    *,
    second_copy: bool,
) -> Choice | None:
    """The version of `path` for all, None if it is to disappear or, for a second copy, is not worth one."""
    holders = picture.holders[path]
    candidates = [rank for rank, entry in holders.items() if _is_candidate(picture, path, rank, entry, deleted)]
    # Copies of each other, with no file of anybody's own, cannot be; if they are, they stay.
    candidates = candidates or [rank for rank in holders if path not in deleted.get(rank, {})]
    if not candidates:
        return None
    order = latest.get(path.partition("/")[0], []) if "/" in path else []
    place = {rank: -index for index, rank in enumerate(order)}
    best = max(
        candidates,
        key=lambda rank: (not holders[rank].torn, place.get(rank, -len(order)), picture.at(rank, holders[rank]), -rank),
    )
    entry = holders[best]
    same = [rank for rank, other in holders.items() if _same(other, entry)]
    owners = [rank for rank in same if not holders[rank].origin]
    # A copy whose disk is lost: the node of rank 0 most likely goes on writing there.
    lost = picture.disks.get(entry.origin, min(picture.manifests))
    owner = min(owners) if owners else lost
    newest = max(candidates, key=lambda rank: picture.at(rank, holders[rank]))
    if not holders[newest].torn:
        return Choice(entry=entry, at=picture.at(best, entry), holders=tuple(same), owner=owner)
    if second_copy:
        return None
    return _whole_one(picture, path, newest, remarks) or Choice(
        entry=entry, at=picture.at(best, entry), holders=tuple(same), owner=owner
    )


def _whole_one(picture: _Picture, path: str, torn: int, remarks: list[Remark]) -> Choice | None:
    """The newest whole version of a path whose newest version is torn, be it a copy or the generation before one."""
    found = [
        (not previous, picture.at(rank, kept[path]), -rank, rank, kept[path], previous)
        for rank, manifest in picture.manifests.items()
        for previous, kept in ((False, manifest.entries), (True, manifest.previous))
        if path in kept and not kept[path].torn and not kept[path].link
    ]
    if not found:
        remarks.append(Remark(kind="torn", path=path, ranks=(torn,)))
        return None
    _, at, _, source, entry, previous = max(found, key=lambda one: (one[1], one[0], one[2]))
    remarks.append(Remark(kind="restored", path=path, ranks=(torn, source), size=entry.version.size))
    same = [] if previous else [rank for rank, other in picture.holders[path].items() if _same(other, entry)]
    return Choice(entry=entry, at=at, holders=tuple(same or [source]), owner=torn, previous=previous)


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


def _orders(
    picture: _Picture,
    rank: int,
    choices: Mapping[str, Choice],
    kept: Sequence[str],
    deleted: Mapping[str, Version],
    bounds: Bounds,
    remarks: list[Remark],
    *,
    second_copy: bool,
) -> Orders:
    manifest = picture.manifests[rank]
    delete = _delete(picture, rank, choices, deleted, second_copy=second_copy)
    wanted: dict[str, list[Transfer]] = defaultdict(list)
    ignored = _deleted_here(manifest)
    for path, choice in choices.items():
        mine = manifest.entries.get(path)
        restores = choice.previous or (mine and mine.torn and not choice.entry.torn)
        if mine and _same(mine, choice.entry):
            continue
        if mine is None and ignored.get(path) == choice.entry.version:
            continue
        if second_copy and not _is_second_copy(picture, rank, choice):
            continue
        wanted[choice.entry.top if not restores else ""].append(_transfer(picture, rank, choice, mine))
    fetch = wanted.pop("", [])
    room = int(manifest.free * (1 - KEEP_FREE)) + sum(version.size for version in dict(delete).values())
    room -= sum(item.entry.stored for item in fetch)
    allowed = bounds.limit
    for top in kept:
        size = sum(item.entry.stored for item in wanted.get(top, ()))
        if not wanted.get(top):
            continue
        if size > room or (allowed is not None and size > allowed):
            kind = "disk_full" if size > room else "over_limit"
            remarks.append(Remark(kind=kind, path=top, ranks=(rank,), size=size))
            continue
        room -= size
        allowed = None if allowed is None else allowed - size
        fetch += wanted.pop(top)
    return Orders(
        delete=delete,
        adopt=_adopt(picture, rank, choices),
        forget=tuple(path for path in (*manifest.gone, *manifest.awaited) if path not in picture.holders),
        owed=tuple(item.entry.path for items in wanted.values() for item in items if not item.entry.origin),
        fetch=tuple(fetch),
    )


def _delete(
    picture: _Picture,
    rank: int,
    choices: Mapping[str, Choice],
    deleted: Mapping[str, Version],
    *,
    second_copy: bool,
) -> tuple[tuple[str, Version], ...]:
    gone = [(path, version) for path, version in deleted.items() if path not in choices]
    if not second_copy:
        return tuple(gone)
    # A script may remove the old before it writes the new: while it trains, a copy goes once this node has a newer one.
    newest = dict[str, float]()
    for choice in choices.values():
        if rank in choice.holders and not choice.entry.torn and not temporary(choice.entry.top):
            newest[choice.entry.top] = max(choice.at, newest.get(choice.entry.top, choice.at))
    entries = picture.manifests[rank].entries
    return tuple(
        (path, version)
        for path, version in gone
        if any(at > picture.at(rank, entries[path]) for top, at in newest.items() if top != entries[path].top)
    )


def _adopt(picture: _Picture, rank: int, choices: Mapping[str, Choice]) -> tuple[tuple[str, str], ...]:
    """Copies whose disk is lost follow the node that has the file as its own, as soon as there is one."""
    found = list[tuple[str, str]]()
    for path, choice in choices.items():
        mine, theirs = (picture.holders[path].get(one) for one in (rank, choice.owner))
        if not mine or not mine.origin or mine.origin in picture.disks or not _same(mine, choice.entry):
            continue
        if choice.owner == rank:
            found.append((path, ""))
        elif theirs and not theirs.origin and _same(theirs, choice.entry):
            found.append((path, picture.manifests[choice.owner].disk))
    return tuple(found)


def _transfer(picture: _Picture, rank: int, choice: Choice, mine: Entry | None) -> Transfer:
    # Nodes that have it share the work; a node of its own has nothing to send.
    source = rank if rank in choice.holders else choice.holders[rank % len(choice.holders)]
    entry, theirs = choice.entry, picture.holders[choice.entry.path].get(choice.owner)
    if choice.owner == rank:
        origin = ""
    elif theirs and not theirs.origin:
        origin = picture.manifests[choice.owner].disk
    else:
        # The owner is still to get it, which may fail: until then this is a copy of a lost disk.
        origin = entry.origin
    return Transfer(
        entry=replace(entry, origin=origin, torn=False),
        source=source,
        previous=choice.previous,
        compare=bool(mine and not mine.link and mine.version.size == entry.version.size),
    )


def _is_second_copy(picture: _Picture, rank: int, choice: Choice) -> bool:
    """Whether this node is the one that keeps a copy of what only one node has: the next in the list."""
    ranks = sorted(picture.manifests)
    following = ranks[(ranks.index(choice.holders[0]) + 1) % len(ranks)]
    return len(choice.holders) == 1 and rank == following and not choice.entry.torn


def _deleted_here(manifest: Manifest) -> dict[str, Version]:
    """Copies that a script deleted on this node, and that shall not come back; none of an emptied disk."""
    left = sum(entry.version.size for entry in manifest.entries.values())
    sizes: dict[str, int] = defaultdict(int)
    for path, copy in manifest.gone.items():
        sizes[path.partition("/")[0]] += copy.version.size
    return {
        path: copy.version for path, copy in manifest.gone.items() if left and 2 * left >= sizes[path.partition("/")[0]]
    }


def _kept_out(
    manifests: Mapping[int, Manifest], choices: Mapping[str, Choice], kept: Sequence[str], *, second_copy: bool
) -> list[Remark]:
    """Older top-level entries that not all nodes have, and that stay where they are."""
    inside = set(kept)
    sizes: dict[str, int] = defaultdict(int)
    for choice in choices.values():
        if choice.entry.top not in inside and not temporary(choice.entry.top) and len(choice.holders) < len(manifests):
            sizes[choice.entry.top] += choice.entry.version.size
    if second_copy or not sizes:
        return []
    return [Remark(kind="kept_out", path=max(sizes), size=sum(sizes.values()), count=len(sizes))]


def newest_entry(manifest: Manifest) -> tuple[str, Version | None]:
    """The newest top-level entry of one node, by its own clock, and the newest version in it; "" for none."""
    entries = [one for one in manifest.entries.values() if not temporary(one.top) and not one.link]
    large = [one for one in entries if one.version.size > SMALL or "/" in one.path]
    newest = max(large or entries, key=lambda one: (one.version.mtime_ns, one.path), default=None)
    return (newest.top, newest.version) if newest else ("", None)
