"""Asks the preloaded process (preload.py) for torchruns and workers: what the launcher and an agent have of it."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

PRELOAD = Path(__file__).with_name("preload.py")
CORE = ("torch", "torch.distributed.run")
"""What the agent needs; without one of them nothing starts warm."""
AGENT, WORKER = b"a", b"w"
"""As in preload.py."""
LOAD_LIMIT = 120.0
"""Seconds that a module besides torch may take: the script that imports it itself can then be seen where it hangs."""
STEP = 0.25
"""Seconds between two looks at whether the other side is still there."""


class Forked:
    """A process that the preloaded one forks, with what this project and torch use of subprocess.Popen."""

    def __init__(self, connection: "PreloadConnection") -> None:
        self._connection = connection
        self.pid = 0
        """0 until it has begun."""
        self.returncode: int | None = None
        self.ended = 0.0
        """Seconds since the epoch; 0 while that is unknown."""
        self.error: OSError | None = None
        """Why it was not forked."""

    def follow(self) -> None:
        """Keeps `pid` and `returncode` up to date by the running event loop."""
        self._connection.follow()

    @property
    def stillborn(self) -> bool:
        """The preloaded process has gone before it came to this."""
        return self.poll() is not None and not self.pid and not self.error

    def poll(self) -> int | None:
        self._connection.receive()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            left = until - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(["worker"], timeout or 0)
            self._connection.pause(min(left, STEP))
        assert self.returncode is not None  # noqa: S101 - poll has just said so
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class PreloadConnection:
    """One asker's socket to the preloaded process; never blocks but in `pause`."""

    def __init__(self, end: socket.socket, hear: Callable[..., None] = lambda *_words: None) -> None:
        """`hear` gets what is not about a process of this asker."""
        self._socket, self._hear = end, hear
        self._asked = deque[Forked]()
        self._begun: dict[int, Forked] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closed = False

    def fork(self, kind: bytes, arguments: Sequence[str], environ: Mapping[str, str], descriptors: list[int]) -> Forked:
        """`descriptors` begins with the child's stdin, stdout and stderr; the caller may close them at once."""
        request = {
            "arguments": list(arguments),
            "environ": dict(environ),
            "cpus": sorted(os.sched_getaffinity(0)),
        }
        process = Forked(self)
        with open(os.memfd_create("request"), "wb") as file:  # noqa: PTH123 - there is no path
            file.write(json.dumps(request).encode())
            file.flush()
            try:
                socket.send_fds(self._socket, [kind], [file.fileno(), *descriptors])
                self._asked.append(process)
            except OSError:
                process.returncode = -signal.SIGKILL
        return process

    def receive(self) -> None:
        """Takes in what has been said meanwhile."""
        while not self.closed:
            try:
                said = self._socket.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                # It ended before it had read all: what it had said itself can still be read.
                continue
            except OSError:
                said = b""
            if said:
                self._take(*json.loads(said))
            else:
                self._end()

    def follow(self) -> None:
        """Has the running event loop take in what is said, as long as there is somebody to say it."""
        # The preloaded process is started before the launcher has this.
        import asyncio

        if not self._loop and not self.closed:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket, self.receive)

    def pause(self, seconds: float) -> None:
        """Returns when something was said, at the latest after `seconds`."""
        select.select([self._socket], [], [], seconds)

    def close(self) -> None:
        self._end()
        self._socket.close()

    def _end(self) -> None:
        self.closed = True
        if self._loop and not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
        # Its children die with it.
        for process in (*self._asked, *self._begun.values()):
            process.returncode = -signal.SIGKILL

    def _take(self, event: str, *details: object) -> None:
        if event == "started":
            process = self._asked.popleft()
            process.pid = int(str(details[0]))
            self._begun[process.pid] = process
        elif event == "refused":
            process, code = self._asked.popleft(), int(str(details[0]))
            process.error, process.returncode = OSError(code, os.strerror(code)), 1
        elif event == "ended":
            pid, code = int(str(details[0])), int(str(details[1]))
            ended = float(str(details[2]))
            # One that was killed before it could say that it had begun.
            process = self._begun.pop(pid) if pid in self._begun else self._asked.popleft()
            process.pid, process.returncode, process.ended = pid, code, ended
        else:
            self._hear(event, *details)


class Preloaded:
    """The launcher's preloaded process: started early, started again when it has died, given up where torch cannot be
    loaded. To be used from the main thread: it is killed when the thread that started it ends."""

    def __init__(
        self,
        modules: Sequence[str],
        environ: Mapping[str, str],
        left_out: Callable[[str, str], None],
        limit: float = LOAD_LIMIT,
    ) -> None:
        """`left_out` gets each module that could not be loaded, and why."""
        self._extra = [name for name in modules if name not in CORE]
        self._environ, self._left_out, self._limit = environ, left_out, limit
        self._possible = bool(modules)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: PreloadConnection | None = None
        self._loading = ""

    @property
    def pid(self) -> int:
        """0 where there is none."""
        return self._process.pid if self._process else 0

    def start(self) -> PreloadConnection | None:
        """What asks it, whether or not it is done with loading; None where there is nothing to ask."""
        if self._connection:
            self._connection.receive()
            if self._connection.closed and self._loading and self._process:
                late = self._process.wait() == -signal.SIGALRM
                why = f"it was not loaded within {self._limit:g} s" if late else "the process that loaded it died"
                self._hear("left out", self._loading, why)
            if self._connection.closed:
                self.stop()
        if not self._connection and self._possible:
            self._connection = self._spawn()
        return self._connection

    def fork(self, arguments: Sequence[str], environ: Mapping[str, str], pipe: int) -> Forked | None:
        """An agent that has `pipe`; None where it must be started in another way."""
        connection = self.start()
        if not connection:
            return None
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123
            return connection.fork(AGENT, arguments, environ, [nothing.fileno(), 1, 2, pipe])

    def stop(self) -> None:
        """Ends it, and with it all that it has forked."""
        if self._process:
            self._process.kill()
            self._process.wait()
        if self._connection:
            self._connection.receive()
            self._connection.close()
        self._process = self._connection = None
        self._loading = ""

    def _spawn(self) -> PreloadConnection:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            modules = [",".join(CORE), ",".join(self._extra)]
            self._process = subprocess.Popen(
                [sys.executable, "-u", str(PRELOAD), str(there.fileno()), str(self._limit), *modules],
                env=self._environ,
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        # A death before its first word is that of torch, or of Python itself.
        self._loading = CORE[0]
        return PreloadConnection(here, self._hear)

    def _hear(self, event: str, *details: object) -> None:
        if event == "loading":
            self._loading = str(details[0])
        elif event == "ready":
            self._loading = ""
        elif event == "left out":
            name, why = (str(each) for each in details)
            self._loading = ""
            self._extra = [each for each in self._extra if each != name]
            self._possible = self._possible and name not in CORE
            self._left_out(name, why)
