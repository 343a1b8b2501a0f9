"""NCCL's own files of settings: what they set counts where the environment does not set it."""

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from app.host.files import text


@dataclass(frozen=True, slots=True, kw_only=True)
class NcclLine:
    name: str
    text: str
    source: str
    """`/etc/nccl.conf:3`"""


def read_nccl_conf(root: Path) -> tuple[NcclLine, ...]:
    """Lines NAME=VALUE, of each name the first: ~/.nccl.conf comes before /etc/nccl.conf (nccl/src/misc/param.cc)."""
    found: dict[str, NcclLine] = {}
    for path in (*_home(), "/etc/nccl.conf"):
        for number, line in enumerate((text(root / path.lstrip("/")) or "").splitlines(), 1):
            name, equals, value = line.partition("=")
            if equals and name.startswith("NCCL_"):
                found.setdefault(name, NcclLine(name=name, text=value, source=f"{path}:{number}"))
    return tuple(found.values())


def _home() -> list[str]:
    # NCCL asks the list of users, not HOME. A container's user may not be in it.
    try:
        return [f"{pwd.getpwuid(os.getuid()).pw_dir}/.nccl.conf"]
    except KeyError:
        return []
