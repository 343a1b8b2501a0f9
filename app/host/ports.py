"""Who listens on a port of this machine. Asked only where a port that this node needs is taken."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

LISTENS = "0A"


def holder(port: int) -> str:
    """Another process that listens on TCP `port`, for people; "" if there is none.

    Processes of other users and containers hide who they are."""
    sockets = set(_listening(port))
    if not sockets:
        return ""
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and int(process.name) != os.getpid() and sockets & set(_sockets(process)):
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                name = shlex.join(words) or (process / "comm").read_text().strip()
                return f"process {process.name} ({name[:100]})"
    hidden = f"another user or container (`sudo ss -ltnp 'sport = :{port}'` names it)"
    return "" if sockets & set(_sockets(Path("/proc/self"))) else hidden


def _listening(port: int) -> Iterator[str]:
    """Their numbers, as the kernel names the sockets of processes."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _sockets(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if found := re.fullmatch(r"socket:\[([0-9]+)\]", str(descriptor.readlink())):
                    yield found[1]
