"""Start commands of the machine, and say in one sentence what failed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


class BedError(Exception):
    """The testbed cannot do what was asked; the message says why and what to do."""


def cache_folder(*parts: str) -> Path:
    """What is slow to make and worth keeping between runs: packages, the base image, the engine that builds."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root.joinpath("torchrun-compose", *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def say(message: str) -> None:
    """Progress for the person who waits."""
    print(f"testbed: {message}", file=sys.stderr, flush=True)


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 600,
) -> str:
    """The command's standard output. Raises BedError with the last lines it said when it fails or takes too long."""
    argv = [str(word) for word in command]
    try:
        done = subprocess.run(argv, env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False)
    except FileNotFoundError as missing:
        raise BedError(f"{argv[0]} is not on this machine") from missing
    except subprocess.TimeoutExpired as late:
        raise BedError(f"`{shlex.join(argv)}` did not end within {timeout:g} s") from late
    if done.returncode != 0:
        tail = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-15:])
        raise BedError(f"`{shlex.join(argv)}` ended with {done.returncode}: {tail}")
    return done.stdout


def until(condition: Callable[[], bool], *, deadline: float, what: str, every: float = 0.05) -> None:
    """Wait until the condition holds; BedError after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise BedError(f"waited {deadline:g} s for {what}")
        time.sleep(every)


@contextlib.contextmanager
def locked(path: Path, *, what: str, deadline: float = 1800) -> Iterator[None]:
    """Hold a lock that the kernel takes back when this process ends in whatever way."""
    with path.open("w") as handle:
        wait_for_lock(handle.fileno(), what=what, deadline=deadline)
        yield


def wait_for_lock(descriptor: int, *, what: str, deadline: float) -> None:
    end, told = time.monotonic() + deadline, time.monotonic() - 8
    while not try_lock(descriptor):
        now = time.monotonic()
        if now > end:
            raise BedError(f"waited {deadline:g} s for {what}, which another process holds")
        if now - told >= 10:
            say(f"waiting for {what}, which another process holds (until {end - now:.0f} s from now)")
            told = now
        time.sleep(0.2)


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
