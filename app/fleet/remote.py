"""One way to run a command on the hosts: the user's own ssh program with its configuration, on all hosts at once, each
with a deadline of its own; what comes back is bounded and printable."""

import asyncio
import contextlib
import functools
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from app.config.console import say
from app.config.errors import printable
from app.config.problems import Problem, problem, texts
from app.fleet.hosts import Desk, Host

T = TypeVar("T")
HERE = Host(name="this machine", rank=-1)
"""The desk itself: its commands need no ssh."""
CONNECT = 5
"""Seconds until a host that does not answer is named."""
LIMIT = 16 << 20
"""Bytes of a command's output that are kept."""
CHUNK = 1 << 16
SSH_FAILED = 255
FAILURES = Path(__file__).parent / "failures.toml"
PATIENCE = 2.0
"""Seconds without a word."""
DRAIN = 0.3
"""Seconds for the end of a command's output once it has ended and somebody else holds the pipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a command ended on a host."""

    host: Host
    code: int
    """255 where ssh itself failed or the deadline passed: `failure` then says why."""
    out: bytes
    err: str
    seconds: float
    began: float = 0.0
    """Seconds since 1970 by this machine's clock."""
    failure: Problem | None = None
    """Why the command could not do its work, in one sentence with the fix; None if it ended with 0."""

    @property
    def text(self) -> str:
        """Standard output as text, control characters spelt out."""
        return lines_of(self.out)


def lines_of(raw: bytes) -> str:
    """Text of a host for this terminal: no escape sequence of its may act here."""
    return "\n".join(printable(line.expandtabs()) for line in raw.decode("utf-8", "replace").splitlines())


Command = str | Callable[[Host], str]


def in_folder(desk: Desk, *words: str, also: str = "") -> str:
    """A command line in the project's folder on a host; `also` are shell words before it, such as NAME=value."""
    return f"cd {shlex.quote(desk.folder)} && {also}{' ' if also else ''}{shlex.join(words)}"


async def run(
    host: Host,
    command: str,
    *,
    stdin: bytes | Path = b"",
    deadline: float = 60,
    limit: int = LIMIT,
    sink: Callable[[bytes], object] | None = None,
) -> Result:
    """Runs a command line of sh on a host. Never raises for what happens there.

    `sink` gets standard output as it comes, in place of `Result.out`.
    """
    began, clock = time.monotonic(), time.time()
    out, err = bytearray(), bytearray()

    def keep(store: bytearray, data: bytes) -> None:
        store += data[: max(0, limit - len(store))]

    with stdin.open("rb") if isinstance(stdin, Path) else tempfile.TemporaryFile() as source:
        if isinstance(stdin, bytes):
            source.write(stdin)
            source.seek(0)
        pipe = asyncio.subprocess.PIPE
        argv = ["sh", "-c", command] if host == HERE else [*ssh(host), remote(command)]
        process = await asyncio.create_subprocess_exec(*argv, stdin=source, stdout=pipe, stderr=pipe)
    readers = [
        asyncio.ensure_future(_read(process.stdout, sink or functools.partial(keep, out))),
        asyncio.ensure_future(_read(process.stderr, functools.partial(keep, err))),
    ]
    late = False
    try:
        async with asyncio.timeout(deadline):
            await process.wait()
    except TimeoutError:
        late = True
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await asyncio.wait(readers[:1], timeout=DRAIN if late else None)
        # An ssh before 8.5 that stays for the shared connection keeps this pipe open.
        await asyncio.wait(readers, timeout=DRAIN)
        for reader in readers:
            reader.cancel()
    code = SSH_FAILED if late else process.returncode or 0
    said = lines_of(bytes(err))
    failure = None if code == 0 else explain_failure(host, code, said, late=deadline if late else 0)
    seconds = time.monotonic() - began
    return Result(host=host, code=code, out=bytes(out), err=said, seconds=seconds, began=clock, failure=failure)


async def _read(stream: asyncio.StreamReader | None, sink: Callable[[bytes], object]) -> None:
    while stream and (data := await stream.read(CHUNK)):
        sink(data)


async def everywhere(
    desk: Desk, command: Command, *, what: str = "", stdin: bytes = b"", deadline: float = 60, limit: int = LIMIT
) -> list[Result]:
    """The same on all hosts at once; results in the order of the hosts. None holds up another."""
    lines = {host: command if isinstance(command, str) else command(host) for host in desk.hosts}
    return await at_once(
        {host: run(host, line, stdin=stdin, deadline=deadline, limit=limit) for host, line in lines.items()}, what
    )


async def at_once(works: Mapping[Host, Coroutine[None, None, T]], what: str) -> list[T]:
    """The results of work on several hosts, in their order. Says for whom it waits, and for `what`."""
    tasks = {asyncio.ensure_future(work): host.name for host, work in works.items()}
    pending, pause = set(tasks), PATIENCE
    try:
        while pending:
            done, pending = await asyncio.wait(pending, timeout=pause)
            if not done and what:
                say(f"waiting for {', '.join(tasks[task] for task in tasks if task in pending)}: {what}")
                pause = 5 * PATIENCE
        return [task.result() for task in tasks]
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def complaints(results: Iterable[Result]) -> dict[Host, str]:
    """Says why each host that failed did; the sentences by host."""
    found = {each.host: each.failure.message for each in results if each.failure}
    for text in found.values():
        say(text)
    return found


def clock_ahead(result: Result, said: str) -> float:
    """How far a host's clock is ahead of ours, in seconds, by what `date +%s.%N` said there; 0 where the way there and
    back explains the difference, or where that date knows no fractions."""
    if not re.fullmatch(r"\d+\.\d+", said):
        return 0.0
    ahead = float(said) - (result.began + result.seconds / 2)
    return ahead if abs(ahead) > result.seconds / 2 else 0.0


async def contact(desk: Desk) -> list[Result]:
    """Whether each host can be used at all, within CONNECT seconds: before anything that takes longer."""
    return await everywhere(desk, "true", deadline=CONNECT + 1)


async def stream(host: Host, command: str, ended: Callable[[int], None] = lambda code: None) -> AsyncGenerator[bytes]:
    """Standard output and error of a command as it comes. `ended` gets its exit code; closing the stream ends ssh."""
    process = await asyncio.create_subprocess_exec(
        *ssh(host),
        remote(command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        while process.stdout and (data := await process.stdout.read(CHUNK)):
            yield data
        ended(await process.wait())
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # Not process.terminate(), which may reap the process behind asyncio's back.
                os.kill(process.pid, signal.SIGTERM)
        # To asyncio a process runs until its pipe is read to the end.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10 * DRAIN):
                await _read(process.stdout, lambda data: None)
                await process.wait()


def remote(command: str) -> str:
    """For sh, whatever the user's login shell there is."""
    return f"exec sh -c {shlex.quote(command)}"


def ssh(host: Host, *, interactive: bool = False) -> list[str]:
    """The start of an ssh command: no questions, a bounded connect, one shared connection a host."""
    options = [] if interactive else ["-T", "-o", "BatchMode=yes"]
    options += ["-o", f"ConnectTimeout={CONNECT}", "-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=2"]
    return ["ssh", *options, *sharing(host.name), "--", host.name]


@functools.cache
def sharing(name: str) -> tuple[str, ...]:
    """Options for one connection for all commands; none where the user's configuration has its own, or forbids it."""
    found = subprocess.run(["ssh", "-G", "--", name], capture_output=True, text=True, check=False, timeout=10).stdout
    if re.search(r"^controlpath (?!none)", found, re.MULTILINE):
        return ()
    # A socket's path is limited to about 104 bytes, which rules out macOS's own temporary folder.
    above = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"  # noqa: S108 - the folder is of this user alone, as is checked
    folder = Path(above, f"torchrun-compose-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return ()
    if folder.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        return ()
    return ("-o", "ControlMaster=auto", "-o", f"ControlPath={folder}/%C", "-o", "ControlPersist=60")


def disconnect(host: Host) -> None:
    """Ends the shared connection: a new group of the user, for one, is seen by new connections only."""
    subprocess.run(["ssh", *sharing(host.name), "-O", "exit", "--", host.name], capture_output=True, check=False)


def explain_failure(host: Host, code: int, said: str, *, late: float = 0) -> Problem:
    """One sentence for what ssh or the command on the host complained of."""
    if late:
        what = (
            "{host} did not answer within {late:g} s" if late <= CONNECT + 1 else "{host} did not finish in {late:g} s"
        )
        return problem("ssh.host-down", what=what, fix="Try `ssh {host}`", host=host.name, late=late)
    for room, named in texts(FAILURES).items():
        for name, each in named.items():
            if "pattern" in each and (room != "ssh" or code == SSH_FAILED) and re.search(each["pattern"], said):
                return problem(f"{room}.{name}", what=each["what"], fix=each["fix"], host=host.name)
    kind, what = ("ssh.failed", "{host}: {said}") if code == SSH_FAILED else ("host.failed", "{host}: {said} ({code})")
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "the command failed without a word")
    return problem(kind, what=what, host=host.name, said=last.strip().rstrip("."), code=code)
