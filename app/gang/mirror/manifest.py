"""What one node has in its CHECKPOINT_DIR, as facts that travel. Whatever a peer says of them is checked here, once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_ENTRIES = 200_000
"""Of one folder; beyond, the oldest top-level entries are left out."""
MOST_PATH, MOST_NAME, MOST_DEPTH = 1024, 255, 24
LARGEST = 1 << 50


@dataclass(frozen=True, slots=True)
class Version:
    """What tells one content of a path from another: a copy keeps both."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file, or a symbolic link to a place inside the folder."""

    path: str
    """Below the folder, with slashes."""
    version: Version
    stored: int = 0
    """Bytes on the disk: less than the size for a sparse file."""
    mode: int = 0o644
    link: str = ""
    """What a symbolic link says; "" for a file."""
    torn: bool = False
    """Its writer was killed half-way."""
    origin: str = ""
    """The disk that it was brought from; "" for a file of this node's own."""

    @property
    def top(self) -> str:
        return self.path.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Copy:
    """What this feature brought here, and from which disk."""

    version: Version
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    disk: str
    """Random, made with the state file: an emptied or new disk has another one."""
    free: int
    """Bytes that a file may still take."""
    entries: Mapping[str, Entry]
    previous: Mapping[str, Entry] = field(default_factory=dict)
    """Copies that were replaced, kept for one generation."""
    gone: Mapping[str, Copy] = field(default_factory=dict)
    """Copies that somebody deleted here."""
    awaited: frozenset[str] = frozenset()
    """What was to come here and has not: a transfer broke off, or found no room. Its absence is nobody's decision."""
    peers: frozenset[str] = frozenset()
    """The disks that took part in the last comparison before a round, this one among them."""
    left_out: int = 0
    """Entries that could not be listed, or were too many: what is not listed may be there."""


def safe_path(text: object) -> str:
    """A path below the folder. Raises ValueError for one that leads anywhere else."""
    if not isinstance(text, str) or not 0 < len(text) <= MOST_PATH or "\0" in text:
        raise ValueError("not a path")
    parts = text.split("/")
    if len(parts) > MOST_DEPTH or any(part in ("", ".", "..") or len(part) > MOST_NAME for part in parts):
        raise ValueError(f"not a path inside the folder: {text[:100]!r}")
    return text


def safe_link(path: str, target: object) -> str:
    """The target of the link at `path`. Raises ValueError if it leads out of the folder."""
    if not isinstance(target, str) or not 0 < len(target) <= MOST_PATH or "\0" in target or target.startswith("/"):
        raise ValueError("not a link inside the folder")
    depth = path.count("/")
    for part in target.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            raise ValueError(f"a link out of the folder: {path[:100]!r}")
    return target


def number(value: object, low: int = 0, high: int = LARGEST) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise ValueError("not a number in its range")


def word(value: object, most: int = 100) -> str:
    if isinstance(value, str) and len(value) <= most and value.isprintable():
        return value
    raise ValueError("not a word")


def listed(value: object, most: int = MOST_ENTRIES) -> list[Any]:
    if isinstance(value, list) and len(value) <= most:
        return value
    raise ValueError(f"not a list of at most {most}")


def read_version(size: object, mtime_ns: object) -> Version:
    return Version(number(size), number(mtime_ns, -(1 << 62), 1 << 62))


def fields(value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError("not an object")


def pack_entry(entry: Entry) -> list[object]:
    version = entry.version
    fields = [entry.path, version.size, version.mtime_ns, entry.stored, entry.mode, entry.link, entry.torn]
    return [*fields, entry.origin]


def read_entry(item: object) -> Entry:
    """Raises ValueError."""
    path, size, mtime_ns, stored, mode, link, torn, origin = row(item, 8)
    path = safe_path(path)
    return Entry(
        path=path,
        version=read_version(size, mtime_ns),
        stored=number(stored),
        mode=number(mode, 0, 0o777),
        link=safe_link(path, link) if link else "",
        torn=bool(torn),
        origin=word(origin),
    )


def pack_copies(copies: Mapping[str, Copy]) -> dict[str, list[object]]:
    return {path: [copy.version.size, copy.version.mtime_ns, copy.origin] for path, copy in copies.items()}


def read_copies(told: object) -> dict[str, Copy]:
    """Raises ValueError."""
    found = {}
    for path, item in fields(told).items():
        size, mtime_ns, origin = row(item, 3)
        found[safe_path(path)] = Copy(read_version(size, mtime_ns), word(origin))
    return found


def pack_manifest(manifest: Manifest) -> dict[str, object]:
    return {
        "disk": manifest.disk,
        "free": manifest.free,
        "entries": [pack_entry(entry) for entry in manifest.entries.values()],
        "previous": [pack_entry(entry) for entry in manifest.previous.values()],
        "gone": pack_copies(manifest.gone),
        "awaited": sorted(manifest.awaited),
        "peers": sorted(manifest.peers),
        "left_out": manifest.left_out,
    }


def read_manifest(told: object) -> Manifest:
    """Raises ValueError."""
    told = fields(told)
    entries = [read_entry(item) for item in listed(told.get("entries"))]
    previous = [read_entry(item) for item in listed(told.get("previous"))]
    return Manifest(
        disk=word(told.get("disk")),
        free=number(told.get("free")),
        entries={entry.path: entry for entry in entries},
        previous={entry.path: entry for entry in previous},
        gone=read_copies(told.get("gone")),
        awaited=frozenset(safe_path(path) for path in listed(told.get("awaited"))),
        peers=frozenset(word(disk) for disk in listed(told.get("peers"))),
        left_out=number(told.get("left_out")),
    )


def row(item: object, count: int) -> list[Any]:
    if not isinstance(item, list) or len(item) != count:
        raise ValueError(f"not a list of {count} fields")
    return item
