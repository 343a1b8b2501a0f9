"""Files and folders that settings name: what is there, and whether this process may use it."""

import os
import stat
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What lies at a path."""

    kind: str = "file"
    """`file`, `folder`, `missing` or `unreadable`."""
    digest: str = ""
    """Of a file's content."""
    size: int = 0
    """Bytes of a file's content without the space around it."""
    obstacle: str = ""
    """What stands in the way of a folder here: the nearest part of the path that is there, where nothing may be
    written."""
    owner: str = ""
    """Of the obstacle, as `uid:gid`."""


def look_at(root: Path, path: str) -> Seen:
    """Reads a file whole; what is neither file nor folder is not read, since a pipe's content would be gone."""
    place = root / path.lstrip("/") if root != Path("/") else Path(path)
    try:
        obstacle = _obstacle(place)
        owner = _owner(obstacle)
        mode = place.stat().st_mode
        if stat.S_ISDIR(mode):
            return Seen(kind="folder", obstacle=obstacle, owner=owner)
        content = place.read_bytes() if stat.S_ISREG(mode) else b""
    except (FileNotFoundError, NotADirectoryError):
        return Seen(kind="missing", obstacle=obstacle, owner=owner)
    except (OSError, ValueError):
        return Seen(kind="unreadable")
    # OpenSSL is slow to load, and the shipped script is a module.
    from hashlib import sha256

    digest = sha256(content).hexdigest()[:12]
    return Seen(digest=digest, size=len(content.strip()), obstacle=obstacle, owner=owner)


def _obstacle(place: Path) -> str:
    there = next((each for each in (place, *place.parents) if os.access(each, os.F_OK)), Path("/"))
    return "" if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else str(there)


def _owner(obstacle: str) -> str:
    if not obstacle:
        return ""
    found = Path(obstacle).stat()
    return f"{found.st_uid}:{found.st_gid}"


def read_program(name: str, limit: int = 1 << 17) -> tuple[str, str]:
    """Where a script lies, or a program on PATH, and the beginning of its text; both empty if it is nowhere."""
    import shutil

    place = name if Path(name).is_file() or "/" in name else shutil.which(name) or ""
    try:
        with open(place, "rb") as file:  # noqa: PTH123 - an empty Path would be the current folder
            return place, file.read(limit).decode(errors="replace")
    except (OSError, ValueError):
        return "", ""


def importable(module: str, python_path: str) -> bool:
    """Whether Python finds the first part of a dotted name; what lies below it is the business of that code."""
    name = module.partition(".")[0]
    folders = ["", *filter(None, python_path.split(":"))]
    # The workers' interpreter is this one, with the hooks of packages that are installed for editing.
    finds = ((PathFinder.find_spec, folders), *((finder.find_spec, None) for finder in sys.meta_path))
    return bool(name) and any(find(name, where) is not None for find, where in finds)
