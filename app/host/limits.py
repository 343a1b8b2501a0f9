"""Limits of this process: locked memory, open files, shared memory, CPUs and memory of its control group."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from app.host.files import number, text

MADE_UP_SHM = "shm-bytes"
"""In a made-up root: the size of /dev/shm, which no file tells."""
UNLIMITED = 1 << 60
"""Control groups v1 say "unlimited" with numbers above it."""
CAP_IPC_LOCK = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    cpus: int = 1
    """CPUs that this process may use, by affinity and by the control group's quota, whichever is less."""
    memory: int | None = None
    """Bytes; None is unlimited."""
    memlock: int | None = None
    """Soft limit in bytes; None is unlimited."""
    may_lock: bool = False
    """The capability IPC_LOCK, under which memlock does not count."""
    open_files: int | None = None
    """Hard limit: a process may raise its own soft one so far."""
    shm: int | None = None
    """Size of /dev/shm in bytes; None if there is none."""


def read_limits(root: Path) -> Limits:
    status = text(root / "proc/self/status") or ""
    allowed = _cpu_list(_line(status, "Cpus_allowed_list"))
    quota = _cpu_quota(root)
    cpus = allowed if quota is None else min(allowed, max(1, math.ceil(quota)))
    limits = text(root / "proc/self/limits") or ""
    return Limits(
        cpus=cpus,
        memory=_memory(root),
        memlock=_limit(limits, "Max locked memory", 0),
        may_lock=bool(int(_line(status, "CapEff") or "0", 16) >> CAP_IPC_LOCK & 1),
        open_files=_limit(limits, "Max open files", 1),
        shm=_shm(root),
    )


def _line(status: str, name: str) -> str:
    found = re.search(rf"^{name}:\s*(\S+)", status, re.MULTILINE)
    return found[1] if found else ""


def _cpu_list(ranges: str) -> int:
    count = 0
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return max(1, count)


def _limit(limits: str, name: str, column: int) -> int | None:
    found = re.search(rf"^{name}\s+(\S+)\s+(\S+)", limits, re.MULTILINE)
    word = found[column + 1] if found else "unlimited"
    return int(word) if word.isdigit() else None


def control_groups(root: Path) -> dict[str, list[Path]]:
    """Folders of this process's control groups by controller ("" is version 2), the nearest first."""
    found: dict[str, list[Path]] = {}
    base = root / "sys/fs/cgroup"
    for line in (text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # In a container the path may be the host's while /sys/fs/cgroup is already the container's own.
        for controller in controllers.split(","):
            top = base / controllers if controllers else base
            own = top / path.lstrip("/")
            found[controller] = [own, *(up for up in own.parents if up == top or top in up.parents)]
    return found


def _cpu_quota(root: Path) -> float | None:
    groups = control_groups(root)
    quotas: list[float] = []
    for folder in groups.get("", []):
        words = (text(folder / "cpu.max") or "max").split()
        if len(words) == 2 and words[0].isdigit() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    for folder in groups.get("cpu", []):
        quota, period = number(folder / "cpu.cfs_quota_us") or -1, number(folder / "cpu.cfs_period_us") or 0
        if quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _memory(root: Path) -> int | None:
    groups = control_groups(root)
    values = [number(folder / "memory.max") for folder in groups.get("", [])]
    values += [number(folder / "memory.limit_in_bytes") for folder in groups.get("memory", [])]
    return min((value for value in values if value is not None and value < UNLIMITED), default=None)


def _shm(root: Path) -> int | None:
    if root != Path("/"):
        return number(root / MADE_UP_SHM)
    try:
        found = os.statvfs("/dev/shm")  # noqa: S108 - its size is the fact, nothing is written there
    except OSError:
        return None
    return found.f_frsize * found.f_blocks
