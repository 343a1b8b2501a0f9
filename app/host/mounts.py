"""Which folders of a container are folders of its host, so that a message can name the path that its reader knows."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from app.host.files import text


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    point: str
    """Where it lies here."""
    source: str
    """The folder that lies here, as a path within its own file system: on the host that is its whole path, unless the
    file system is mounted there in a folder of its own."""
    read_only: bool = False


def read_mounts(root: Path) -> tuple[Mount, ...]:
    """What is mounted here, longest path first. Format: proc_pid_mountinfo(5)."""
    found = []
    for line in (text(root / "proc/self/mountinfo") or "").splitlines():
        words = line.split(" ")
        if len(words) > 5:
            source, point = (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), each) for each in words[3:5])
            found.append(Mount(point=point, source=source, read_only="ro" in words[5].split(",")))
    return tuple(sorted(found, key=lambda each: (-len(each.point), each.point)))


def mount_of(path: Path, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that `path` lies on."""
    return next((each for each in mounts if path.is_relative_to(each.point)), None)
