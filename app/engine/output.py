"""What the ranks of one node print: whole lines with their rank, to Docker's log first, and to files as far as there is
room.

torch has a rank write into a file and copies that: on a full disk every print then raises. Here it writes into a pipe.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CHUNK = 1 << 16
ATOMIC = 4096
"""Bytes that a write to a pipe keeps together (PIPE_BUF), whoever else writes there."""
LONGEST_LINE = 1 << 20
PROGRESS = 10.0
"""Seconds between two states of one progress bar."""
RETRY = 60.0
"""Seconds until a file that could not be written is tried again."""
DRAIN = 2.0
"""Seconds for what the workers' own children still print when the workers have ended."""
NOISE = re.compile(rb"\[c10d\] The hostname of the client socket cannot be retrieved")
"""torch resolves the address of every client for its messages, and complains for each that has no name."""


class Lines:
    """Cuts a stream into whole lines. Of a line that is written over with `\\r` it gives the last state, and one every
    PROGRESS seconds meanwhile."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._rest, self._shown = clock, b"", clock()

    def feed(self, data: bytes) -> bytes:
        """The lines that are complete with `data`."""
        whole, end, self._rest = (self._rest + data).rpartition(b"\n")
        lines = whole + end
        if b"\r" in lines:
            lines = b"".join(_last_state(line) + b"\n" for line in lines[:-1].split(b"\n"))
        if b"\r" in self._rest:
            self._rest = b"\r" + _last_state(self._rest)
            if self._clock() - self._shown >= PROGRESS:
                self._shown = self._clock()
                lines += self._rest[1:] + b"\n"
        if len(self._rest) > LONGEST_LINE:
            lines, self._rest = lines + self._rest + b"\n", b""
        if NOISE.search(lines):
            lines = b"".join(line for line in lines.splitlines(keepends=True) if not NOISE.search(line))
        return lines

    def end(self) -> bytes:
        """The last line, which may lack its end."""
        rest, self._rest = _last_state(self._rest), b""
        return rest + b"\n" if rest else b""


def _last_state(line: bytes) -> bytes:
    """What a terminal would show of it: the last part that is not blank."""
    return next((part for part in reversed(line.split(b"\r")) if part.strip()), b"")


@dataclass(slots=True)
class LogFile:
    """A file of at most `limit` bytes, with one predecessor. Never raises: where there is no room, `lost` is called
    once, and lines are kept again when there is room again."""

    path: Path
    limit: int
    lost: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _descriptor: int = -1
    _size: int = 0
    _wait: float = 0.0
    _told: bool = False

    def write(self, lines: bytes) -> None:
        if not self.limit or self.clock() < self._wait:
            return
        try:
            if self._descriptor >= 0 and self._size + len(lines) > self.limit:
                self.close()
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))
            if self._descriptor < 0:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                self._size = os.fstat(self._descriptor).st_size
            self._size += os.write(self._descriptor, lines)
        except OSError as error:
            self._wait = self.clock() + RETRY
            if not self._told:
                self._told = True
                self.lost(f"{self.path} cannot be written ({error.strerror}): output is in the container's log alone")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


@dataclass(slots=True)
class Output:
    """The outputs of all ranks of one kind (stdout or stderr), in place of torch's TailLog."""

    destination: int
    """Descriptor to which the lines go."""
    prefixes: Mapping[int, str]
    files: Mapping[int, Path]
    limit: int
    lock: threading.Lock
    """Of all outputs of this process."""
    ends: dict[int, int] = field(default_factory=dict)
    """Writing ends of the pipes by local rank."""
    _threads: list[threading.Thread] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def paths(self) -> dict[int, str]:
        """Makes the pipes; returns where each local rank shall write."""
        for rank in self.files:
            read, self.ends[rank] = os.pipe()
            name = f"output of {rank}"
            self._threads.append(threading.Thread(target=self._copy, args=(rank, read), name=name, daemon=True))
        return {rank: f"/proc/{os.getpid()}/fd/{end}" for rank, end in self.ends.items()}

    def start(self) -> "Output":
        """The workers have their ends by now: what this process holds would keep the pipes open after them."""
        self._close_ends()
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """When the workers have ended; what they left in the pipes is still copied."""
        self._stopped.set()
        self._close_ends()
        until = time.monotonic() + DRAIN
        for thread in self._threads:
            if thread.ident:
                thread.join(max(0.0, until - time.monotonic()))

    def stopped(self) -> bool:
        return self._stopped.is_set()

    def _close_ends(self) -> None:
        while self.ends:
            os.close(self.ends.popitem()[1])

    def _copy(self, rank: int, end: int) -> None:
        lines, prefix = Lines(), self.prefixes.get(rank, f"[rank {rank}] ").encode()
        file = LogFile(self.files[rank], self.limit, lambda text: self._emit(f"torchrun-compose: {text}\n".encode()))
        # A rank that prints nothing has an empty file: the report tells silence from a loss.
        file.write(b"")
        with open(end, "rb", buffering=0) as pipe:
            while data := pipe.read(CHUNK):
                self._keep(lines.feed(data), prefix, file)
        self._keep(lines.end(), prefix, file)
        file.close()

    def _keep(self, lines: bytes, prefix: bytes, file: LogFile) -> None:
        if lines:
            self._emit(prefix + lines[:-1].replace(b"\n", b"\n" + prefix) + b"\n")
            file.write(lines)

    def _emit(self, lines: bytes) -> None:
        """Whole lines together, so that those of other processes come between lines and not into them."""
        start = 0
        while start < len(lines):
            cut = lines.rfind(b"\n", start, start + ATOMIC) + 1 or lines.find(b"\n", start) + 1 or len(lines)
            with self.lock, contextlib.suppress(OSError):
                _write_all(self.destination, lines[start:cut])
            start = cut


class OwnLines:
    """What this process itself prints on `descriptor`, without NOISE, from the beginning until it is closed."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor, self._original = descriptor, os.dup(descriptor)
        read, write = os.pipe()
        os.dup2(write, descriptor)
        os.close(write)
        self._thread = threading.Thread(target=self._copy, args=(read,), name="own output", daemon=True)
        self._thread.start()

    def _copy(self, end: int) -> None:
        lines = Lines()
        with open(end, "rb", buffering=0) as pipe, contextlib.suppress(OSError):
            while data := pipe.read(CHUNK):
                _write_all(self._original, lines.feed(data))
            _write_all(self._original, lines.end())

    def close(self) -> None:
        if self._original >= 0:
            os.dup2(self._original, self._descriptor)
            self._thread.join(DRAIN)
            os.close(self._original)
        self._original = -1


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def in_pipes(stdouts: Mapping[int, str], stderrs: Mapping[int, str], prefixes: Mapping[int, str]) -> list[Output]:
    """The outputs of all ranks of this node, in place of the files that torch would have them write."""
    limit, lock = int(os.environ.get("LOG_BYTES") or 0), threading.Lock()
    return [
        Output(number, prefixes, {rank: Path(path) for rank, path in files.items()}, limit, lock)
        for number, files in ((1, stdouts), (2, stderrs))
    ]
