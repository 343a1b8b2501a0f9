"""Processes below one, as /proc shows them: no package of the image is needed for it."""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    pid: int
    parent: int
    state: str
    begun: str
    """With the pid, what no later process has too."""

    def lives(self) -> bool:
        now = read(self.pid)
        return now is not None and now.begun == self.begun and now.state not in "ZX"

    def tell(self, number: signal.Signals) -> None:
        """Signals it, if it is still itself."""
        if self.lives():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)


def read(pid: int) -> Process | None:
    try:
        # Its name stands in parentheses, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return Process(pid=pid, parent=int(fields[1]), state=fields[0], begun=fields[19])


def below(root: int) -> list[Process]:
    """All descendants, those included that have ended and that their parent has not looked at yet."""
    everyone = [process for name in os.listdir("/proc") if name.isdigit() and (process := read(int(name)))]  # noqa: PTH208
    found, parents = list[Process](), {root}
    while parents:
        children = [process for process in everyone if process.parent in parents]
        found += children
        parents = {process.pid for process in children}
    return found
