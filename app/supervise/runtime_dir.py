"""What belongs to one launcher alone: its part of the run's folder, and a folder on this machine for the heartbeats of
its ranks and its state for the health check.

The latter is in the temporary folder (writable in a read-only container, and not on a file server), private to the
user and to this launcher, and locked while the launcher lives: what `kill -9` leaves behind the next start removes.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from app.config.errors import UserError, printable
from app.plan import Plan
from app.supervise.files import in_time

LOCK = 5.0
"""Seconds that a file system has for a lock."""


@contextlib.contextmanager
def runtime_dir() -> Iterator[Path]:
    """A new one, removed at the end. Raises UserError where there is no temporary folder."""
    for folder in _all():
        with _locked(folder) as locked:
            if locked:
                shutil.rmtree(folder, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(tempfile.mkdtemp(prefix=_prefix()))
            # Between these two another start may have taken it for one that was left behind.
            while not (stack.enter_context(_locked(folder)) and folder.exists()):
                folder = Path(tempfile.mkdtemp(prefix=_prefix()))
        except OSError as error:
            raise UserError(f"No temporary folder can be written: {error.strerror}. Set TMPDIR.") from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def one_job(plan: Plan) -> Iterator[None]:
    """Keeps other jobs away from this node's part of the run's folder, where both would write their checkpoints and
    logs. Raises UserError where one is there already; on a file system without locks nobody is kept away."""
    path, descriptor = plan.log_dir / ".lock", -1
    try:
        descriptor = in_time(lambda: os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), LOCK)
        in_time(lambda: _take(descriptor, path), LOCK)
    except BlockingIOError:
        holder = in_time(lambda: os.read(descriptor, 100).decode(errors="replace"), LOCK)
        raise UserError(
            f"RUN_NAME={plan.run_name}: node {plan.nodes.rank} of a job of that name is running in "
            f"{plan.script.run_dir} ({printable(holder)}). Stop it, or set another RUN_NAME and another MASTER_PORT on "
            "all nodes to run a second job beside it."
        ) from None
    except OSError:
        pass
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    """Raises BlockingIOError."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}")


def running() -> list[Path]:
    """The folders of all launchers of this user that live."""
    found = []
    for folder in _all():
        with _locked(folder) as locked:
            if not locked and folder.exists():
                found.append(folder)
    return found


def _all() -> list[Path]:
    """Of this user only, and no links: others may write to the temporary folder, too."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if entry.name.startswith(_prefix()) and stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                    found.append(Path(entry.path))
    return sorted(found)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process has the lock now; the kernel takes it back when a process ends, however it ends."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _prefix() -> str:
    return f"torchrun-compose-{os.getuid()}-"
