"""One node's CHECKPOINT_DIR: what is in it, and changes that a kill at any moment leaves whole.

No path of a peer's leads through a symbolic link: every folder on the way is opened by itself, without following one.
"""

import contextlib
import ctypes
import errno
import itertools
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from app.gang.mirror.manifest import (
    MOST_ENTRIES,
    Copy,
    Entry,
    Manifest,
    Version,
    fields,
    listed,
    pack_copies,
    read_copies,
    safe_link,
    safe_path,
    word,
)
from app.gang.mirror.whole import SUFFIXES, is_torn

INSIDE = ".torchrun-compose"
"""The work folder, where none beside CHECKPOINT_DIR is on the same file system."""
LARGEST_STATE = 1 << 28
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(slots=True)
class State:
    """What this feature remembers of one folder."""

    disk: str
    brought: dict[str, Copy] = field(default_factory=dict)
    awaited: dict[str, Copy] = field(default_factory=dict)
    """What was on its way or found no room; written before the first byte of it comes."""
    peers: frozenset[str] = frozenset()
    """The disks of the last comparison."""


class Disk:
    """CHECKPOINT_DIR of this node with the work folder of this feature. Every method may block."""

    def __init__(self, folder: Path) -> None:
        """Makes both folders. Raises OSError."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.work = _work_folder(folder)
        self._work = os.open(self.work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in ("incoming", "previous", "torn"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=self._work)
        self.state = self._read_state()
        self._looked: dict[str, tuple[Version, bool]] = {}
        self._counter = itertools.count()

    def close(self) -> None:
        for fd in (self._root, self._work):
            with contextlib.suppress(OSError):
                os.close(fd)

    # The nonce: nodes that see each other's share the disk.

    def mark(self, nonce: str) -> None:
        with os.fdopen(os.open(f".{nonce}", NEW, 0o644, dir_fd=self._root), "wb") as file:
            os.fsync(file.fileno())

    def sees(self, nonce: str) -> bool:
        # Asked by name, not listed: a network file system may show an old listing for a minute.
        with contextlib.suppress(OSError):
            os.stat(f".{nonce}", dir_fd=self._root, follow_symlinks=False)
            return True
        return False

    def unmark(self, nonce: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(f".{nonce}", dir_fd=self._root)

    # What is there.

    def scan(self) -> Manifest:
        """Raises OSError if the folder itself cannot be read."""
        entries, left_out = self._entries(self.folder)
        previous, _ = self._entries(self.work / "previous")
        state = self.state
        for path, copy in [*state.awaited.items()]:
            entry = entries.get(path)
            if entry and entry.version == copy.version and copy.origin:
                state.brought[path] = copy
            if entry:
                del state.awaited[path]
        for path, entry in entries.items():
            known = state.brought.get(path)
            if known and known.version == entry.version:
                entries[path] = replace(entry, origin=known.origin)
            elif known and known.version.mtime_ns == entry.version.mtime_ns:
                # The machine lost its power before all of the copy was on the disk.
                entries[path] = replace(entry, origin=known.origin, torn=True)
            elif known:
                # Written again by a script of this node.
                del state.brought[path]
        room = os.statvfs(self.folder)
        return Manifest(
            disk=state.disk,
            free=room.f_bavail * room.f_frsize,
            entries=entries,
            previous=previous,
            gone={path: copy for path, copy in state.brought.items() if path not in entries and not left_out},
            awaited=frozenset(state.awaited),
            peers=state.peers,
            left_out=left_out,
        )

    def _entries(self, folder: Path) -> tuple[dict[str, Entry], int]:
        """All files and links below `folder`, and how many things could not be listed."""
        found: dict[str, Entry] = {}
        left_out = 0
        with os.scandir(folder) as listing:
            tops = sorted(listing, key=lambda one: -_mtime(one))
        pending = [(one, one.name) for one in reversed(tops) if one.name != INSIDE]
        while pending:
            item, path = pending.pop()
            try:
                if item.is_dir(follow_symlinks=False):
                    with os.scandir(item.path) as listing:
                        pending += [(one, f"{path}/{one.name}") for one in listing]
                elif len(found) >= MOST_ENTRIES:
                    left_out += 1
                    break
                elif entry := self._entry(item, path, folder):
                    found[path] = entry
            except FileNotFoundError:
                continue
            except OSError:
                left_out += 1
        return found, left_out

    def _entry(self, item: os.DirEntry[str], path: str, folder: Path) -> Entry | None:
        """None for what cannot be copied: a socket, a device, a link out of the folder, the mark of a node."""
        status = item.stat(follow_symlinks=False)
        try:
            safe_path(path)
            if stat.S_ISLNK(status.st_mode):
                link = _inner_link(path, str(Path(item.path).readlink()), self.folder)
                return Entry(path=path, version=Version(0, status.st_mtime_ns), link=link)
        except ValueError:
            return None
        if not stat.S_ISREG(status.st_mode) or path.startswith(".mirror-"):
            return None
        version = Version(status.st_size, status.st_mtime_ns)
        torn = path.endswith(SUFFIXES) and self._is_torn(item.path, version)
        stored = min(status.st_blocks * 512, status.st_size)
        return Entry(path=path, version=version, stored=stored, mode=status.st_mode & 0o777, torn=torn)

    def _is_torn(self, path: str, version: Version) -> bool:
        known = self._looked.get(path)
        if known and known[0] == version:
            return known[1]
        fd = os.open(path, READ)
        try:
            torn = is_torn(path, fd, version.size)
        finally:
            os.close(fd)
        if len(self._looked) > MOST_ENTRIES:
            self._looked.clear()
        self._looked[path] = (version, torn)
        return torn

    # Changes.

    def begin(self) -> None:
        """Removes what a killed transfer left."""
        for left in (self.work / "incoming").iterdir():
            left.unlink()

    def incoming(self, size: int) -> tuple[int, str]:
        """A new file of `size` bytes under a name that no script looks at: (descriptor, name). Raises OSError."""
        name = f"incoming/{next(self._counter)}"
        fd = os.open(name, NEW, 0o600, dir_fd=self._work)
        try:
            os.truncate(fd, size)
        except OSError:
            os.close(fd)
            self.drop(name)
            raise
        return fd, name

    def drop(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._work)

    def complete(self, fd: int, entry: Entry) -> None:
        """Closes an incoming file that has all its bytes. Raises OSError."""
        try:
            os.fchmod(fd, entry.mode | 0o600)
            os.utime(fd, ns=(entry.version.mtime_ns, entry.version.mtime_ns))
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Returns once all that came is on the disk. Raises OSError."""
        if ctypes.CDLL(None, use_errno=True).syncfs(self._root):
            raise OSError(ctypes.get_errno(), "syncfs")

    def make_link(self, entry: Entry) -> None:
        name = f"incoming/{next(self._counter)}"
        os.symlink(safe_link(entry.path, entry.link), name, dir_fd=self._work)
        times = (entry.version.mtime_ns, entry.version.mtime_ns)
        os.utime(name, ns=times, dir_fd=self._work, follow_symlinks=False)
        self.place(name, entry.path)

    def put_back(self, entry: Entry) -> None:
        """Gives the generation before its name again. Raises OSError."""
        name = f"incoming/{next(self._counter)}"
        with self._parent(self._work, f"previous/{entry.path}") as (parent, base):
            os.link(base, name, src_dir_fd=parent, dst_dir_fd=self._work, follow_symlinks=False)
        self.place(name, entry.path)

    def touch(self, entry: Entry) -> None:
        """A file of this node has the content of `entry`: it gets its time as well. Raises OSError."""
        with self._parent(self._root, entry.path) as (parent, base):
            times = (entry.version.mtime_ns, entry.version.mtime_ns)
            os.utime(base, ns=times, dir_fd=parent, follow_symlinks=False)

    def place(self, name: str, path: str) -> None:
        """Gives an incoming file its name; what had the name is kept for one generation. Raises OSError."""
        try:
            with self._parent(self._root, path, make=True) as (parent, base):
                self._keep(parent, base, path)
                os.rename(name, base, src_dir_fd=self._work, dst_dir_fd=parent)
        except OSError:
            self.drop(name)
            raise

    def _keep(self, parent: int, base: str, path: str) -> None:
        """A second name for what is replaced, so that there is no moment without a file of the first one."""
        try:
            fd = os.open(base, READ, dir_fd=parent)
        except OSError:
            return
        try:
            status = os.fstat(fd)
            torn = stat.S_ISREG(status.st_mode) and is_torn(path, fd, status.st_size)
        finally:
            os.close(fd)
        if not stat.S_ISREG(status.st_mode):
            return
        # A file system without hard links keeps no generation; the copy itself matters more.
        with contextlib.suppress(OSError):
            kept = f"{'torn' if torn else 'previous'}/{path}"
            with self._parent(self._work, kept, make=True) as (folder, old):
                spare = f".{secrets.token_hex(4)}"
                os.link(base, spare, src_dir_fd=parent, dst_dir_fd=folder, follow_symlinks=False)
                os.rename(spare, old, src_dir_fd=folder, dst_dir_fd=folder)

    def delete(self, path: str, version: Version) -> bool:
        """Removes a copy if it is still the one that was brought, and folders that are empty then."""
        known = self.state.brought.get(path)
        if not known or known.version != version:
            return False
        with contextlib.suppress(OSError):
            with self._parent(self._root, path) as (parent, base):
                status = os.stat(base, dir_fd=parent, follow_symlinks=False)
                size = 0 if stat.S_ISLNK(status.st_mode) else status.st_size
                if Version(size, status.st_mtime_ns) != version:
                    return False
                os.unlink(base, dir_fd=parent)
            del self.state.brought[path]
            self._forget_previous(path)
            self._remove_empty(self._root, path)
            return True
        return False

    def _forget_previous(self, path: str) -> None:
        for kept in ("previous", "torn"):
            with contextlib.suppress(OSError), self._parent(self._work, f"{kept}/{path}") as (parent, base):
                os.unlink(base, dir_fd=parent)

    def set_aside(self, tops: Sequence[str]) -> None:
        """Moves incomplete entries out of the script's sight, in place of those of the time before. Raises OSError."""
        shutil.rmtree(self.work / "torn", ignore_errors=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir("torn", dir_fd=self._work)
        for top in tops:
            os.rename(safe_path(top), f"torn/{top}", src_dir_fd=self._root, dst_dir_fd=self._work)
        self.forget([path for path in self.state.brought if path.partition("/")[0] in tops])

    def forget_old(self, manifest: Manifest) -> None:
        """Removes generations of what a script has deleted meanwhile; not those of an emptied disk."""
        if manifest.entries and not manifest.left_out:
            for path in manifest.previous.keys() - manifest.entries.keys() - manifest.gone.keys():
                self._forget_previous(path)
                self._remove_empty(self._work, f"previous/{path}")

    def _remove_empty(self, root: int, path: str) -> None:
        with contextlib.suppress(OSError):
            while "/" in path:
                path = path.rpartition("/")[0]
                with self._parent(root, path) as (parent, base):
                    os.rmdir(base, dir_fd=parent)

    # Reading for a peer.

    def open_to_read(self, path: str, *, previous: bool) -> int:
        """A descriptor of a regular file. Raises OSError."""
        root, full = (self._work, f"previous/{path}") if previous else (self._root, path)
        with self._parent(root, full) as (parent, base):
            fd = os.open(base, READ, dir_fd=parent)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file")
        return fd

    @contextlib.contextmanager
    def _parent(self, root: int, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The folder of `path` as a descriptor, and the last name. Raises OSError."""
        *folders, base = safe_path(path).split("/")
        current = root
        try:
            for name in folders:
                following = _open_folder(name, current, make=make)
                if current != root:
                    os.close(current)
                current = following
            yield current, base
        finally:
            if current != root:
                os.close(current)

    # The state file.

    def expect(self, copies: Mapping[str, Copy]) -> None:
        """Remembers what is about to come, before it comes. Raises OSError."""
        self.state.awaited.update(copies)
        self.write_state()

    def arrived(self, path: str, copy: Copy) -> None:
        self.state.awaited.pop(path, None)
        if copy.origin:
            self.state.brought[path] = copy
        else:
            self.state.brought.pop(path, None)

    def adopt(self, changes: Iterable[tuple[str, str]]) -> None:
        """Copies of a lost disk get another origin, or become this node's own."""
        for path, origin in changes:
            if known := self.state.brought.get(path):
                self.arrived(path, Copy(known.version, origin))

    def forget(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.state.brought.pop(path, None)
            self.state.awaited.pop(path, None)

    def write_state(self) -> None:
        """Raises OSError."""
        told = {
            "disk": self.state.disk,
            "peers": sorted(self.state.peers),
            **{name: pack_copies(getattr(self.state, name)) for name in ("brought", "awaited")},
        }
        fd = os.open("state.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644, dir_fd=self._work)
        with os.fdopen(fd, "w") as file:
            json.dump(told, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        os.rename("state.new", "state.json", src_dir_fd=self._work, dst_dir_fd=self._work)

    def _read_state(self) -> State:
        """What was remembered; a new disk's state where that is nothing, or makes no sense."""
        try:
            with os.fdopen(os.open("state.json", READ, dir_fd=self._work), "rb") as file:
                told = fields(json.loads(file.read(LARGEST_STATE)))
            brought, awaited = (read_copies(told.get(name)) for name in ("brought", "awaited"))
            peers = frozenset(word(disk) for disk in listed(told.get("peers", [])))
            return State(disk=word(told.get("disk")), brought=brought, awaited=awaited, peers=peers)
        except (OSError, ValueError, RecursionError):
            return State(disk=secrets.token_hex(8))


def _work_folder(folder: Path) -> Path:
    """Beside CHECKPOINT_DIR, so that scripts which look for an empty folder find one; inside it where files cannot be
    moved from there (a mount of its own, a parent that cannot be written). Raises OSError."""
    folder = folder.resolve()
    beside, probe = folder.parent / f".{folder.name}.mirror", f".mirror-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        beside.mkdir(mode=0o755, exist_ok=True)
        (beside / probe).touch()
        try:
            (beside / probe).rename(folder / probe)
        except OSError:
            (beside / probe).unlink()
            beside.rmdir()
            raise
        (folder / probe).unlink()
        return beside
    inside = folder / INSIDE
    inside.mkdir(mode=0o755, exist_ok=True)
    return inside


def _open_folder(name: str, parent: int, *, make: bool) -> int:
    try:
        return os.open(name, FOLDER, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
    return os.open(name, FOLDER, dir_fd=parent)


def _inner_link(path: str, target: str, folder: Path) -> str:
    """The target below the folder, also of a link that names it by its whole path. Raises ValueError."""
    if target.startswith("/"):
        for root in (folder, folder.resolve()):
            with contextlib.suppress(ValueError):
                inner = Path(os.path.normpath(target)).relative_to(root)
                return safe_link(path, "/".join([".."] * path.count("/") + list(inner.parts)))
    return safe_link(path, target)


def _mtime(item: os.DirEntry[str]) -> int:
    try:
        return item.stat(follow_symlinks=False).st_mtime_ns
    except OSError:
        return 0
