"""The engine as a child process: its start, how it ends, and that nothing of it stays behind."""

import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from app.engine.outcome import Failure, Moments, Outcome
from app.engine.processes import Process, below
from app.engine.warm import Forked, Preloaded
from app.known_errors.consequences import is_consequence

PIPE = "TORCHRUN_COMPOSE_PIPE"
LAUNCHER_WORDS = 3
"""Of `command_line`: the interpreter, -P, and the agent; an agent that is forked needs none of them."""
KILL_AFTER = 3.0
"""Seconds that torchrun has to end by itself once its workers are killed."""
SAY_WHY = 8.0
"""Seconds instead of these after a failure: on a busy machine torchrun takes more than five to say what its worker died
of, and killed before that it would count as the failure itself. The gang waits longer (Round.patience)."""


class Torchrun:
    """One running torchrun. Start it from the main thread: it is killed when the thread that started it ends."""

    def __init__(
        self,
        command: list[str],
        env: Mapping[str, str],
        keep: Callable[[Outcome], None] = lambda _outcome: None,
        preloaded: Preloaded | None = None,
    ) -> None:
        """`keep` gets the outcome as soon as there is one."""
        self.command, self.env, self.keep, self.preloaded = command, env, keep, preloaded
        self.moments = Moments(launched=time.time())
        self.told_to_end = self.killing = self.slow = False
        self._begin()

    def _begin(self) -> None:
        self.read_fd, write_fd = os.pipe()
        forked = None
        try:
            if self.preloaded:
                forked = self.preloaded.fork(self.command[LAUNCHER_WORDS:], self.env, write_fd)
            self.process: Forked | subprocess.Popen[bytes] = forked or subprocess.Popen(
                self.command,
                env={**self.env, PIPE: str(write_fd)},
                pass_fds=[write_fd],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(write_fd)
        self.root = self.preloaded.pid if self.preloaded and forked else self.process.pid
        """The process below which all of this round is."""

    async def watch(self, failing: Callable[[], None]) -> Outcome:
        """Waits for the end. `failing` is called once, as soon as torchrun begins to end its workers."""
        failures: tuple[Failure, ...] = ()
        closing = told_to_end = killing = finished = False
        async for event in self._events():
            if event["event"] == "begun":
                self.moments.begun = event["time"]
                continue
            if event["event"] == "finished":
                # A script may end with 0 because it is told to.
                finished = not self.told_to_end
                continue
            if event["event"] == "failed":
                failures = first_cause_first([_failure(fields) for fields in event["failures"]])
            if not closing:
                closing, told_to_end, killing = True, self.told_to_end, self.killing
                self.moments.died = event.get("died", 0.0)
                self.moments.told = self.moments.told or time.time()
                failing()
        if not closing:
            told_to_end, killing = self.told_to_end, self.killing
        if self.slow and not failures and not told_to_end:
            text = f"a worker failed, and torchrun had not said why after {SAY_WHY:.0f} s: see the output above"
            failures = (Failure(rank=-1, exitcode=1, text=text, time=time.time()),)
        # Within the grace a worker may be killed by others than us.
        halted = killing if failures and failures[0].exitcode == -signal.SIGKILL else told_to_end
        outcome = Outcome(code=self.process.returncode or 0, failures=failures, halted=halted, finished=finished)
        self.keep(outcome)
        return outcome

    async def _events(self) -> AsyncIterator[Any]:
        """What the agent says, until it has ended."""
        while True:
            if isinstance(self.process, Forked):
                self.process.follow()
            reader = asyncio.StreamReader(limit=1 << 22)
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                functools.partial(asyncio.StreamReaderProtocol, reader), os.fdopen(self.read_fd, "rb", buffering=0)
            )
            # The end of the pipe is the end of torchrun: nobody else holds it open.
            async for line in reader:
                yield json.loads(line)
            transport.close()
            while self.process.poll() is None:
                await asyncio.sleep(0.01)
            if isinstance(self.process, subprocess.Popen) or not self.process.stillborn or self.told_to_end:
                break
            # A module of PRELOAD has ended the process that was to fork it; the next try goes without that module.
            self._begin()
        if isinstance(self.process, Forked) and self.process.error:
            raise self.process.error

    async def end(self, *, gently: bool, grace: float) -> None:
        """Ends the workers: asks, and kills what is left after `grace` seconds; torchrun then ends by itself.

        Gently (the user stops the job), torchrun is asked and passes SIGTERM on. Otherwise (another node failed) only
        its workers are: torchrun then still tells if one of them had failed before."""
        self.told_to_end = True
        self.moments.told = self.moments.told or time.time()
        workers = self._workers()
        if gently and not workers:
            # It may wait for the torchruns of other nodes, deaf to SIGTERM.
            self.kill()
        elif gently or not workers:
            # Without workers it is starting, and ends; or it is about to say why one died, and is deaf too (agent.py).
            self._tell(signal.SIGTERM)
        else:
            self._tell_workers(signal.SIGTERM)
        await asyncio.sleep(grace)
        # Of the user's grace torchrun's own --shutdown-timeout comes first.
        await asyncio.sleep(KILL_AFTER if gently else 0)
        self.killing = self._tell_workers(signal.SIGKILL) > 0
        await asyncio.sleep(KILL_AFTER if gently else SAY_WHY)
        self.slow = not gently and self.process.poll() is None
        self.kill()

    def kill(self) -> None:
        """Ends torchrun and all below it at once, if it has not ended by itself."""
        self._tell_workers(signal.SIGKILL)
        self._tell(signal.SIGKILL)

    def _tell(self, number: signal.Signals) -> None:
        if self.preloaded and not self.process.pid and self.process.poll() is None:
            # It is not forked yet, and would be later.
            self.preloaded.stop()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def _tell_workers(self, number: signal.Signals) -> int:
        """Signals all below torchrun; returns how many of those live."""
        alive = [worker for worker in self._workers() if worker.lives()]
        for worker in alive:
            worker.tell(number)
        return len(alive)

    def _workers(self) -> list[Process]:
        """All below torchrun, those included that have ended and that it has not looked at yet."""
        if self.process.poll() is not None:
            # Its number may be another process's by now.
            return []
        return [each for each in below(self.root) if each.pid != self.process.pid]


def first_cause_first(failures: list[Failure]) -> tuple[Failure, ...]:
    """torchrun looks ten times in a second, so that the worker whose peer has gone may stand before that peer."""
    own = [each for each in failures if each.text and not is_consequence(each.text)]
    if own and is_consequence(failures[0].text):
        failures = [own[0], *(each for each in failures if each is not own[0])]
    return tuple(failures)


def adopt_orphans() -> None:
    """Makes this process the parent of whatever its descendants leave behind, so that `sweep` finds it."""
    import ctypes

    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


def sweep(keep: int = 0) -> int:
    """Kills and reaps every descendant of this process but `keep`; returns how many were still alive. Needs
    `adopt_orphans`.

    For use between rounds: no torchrun may be running."""
    if not _reap():
        return 0
    left = [each for each in below(os.getpid()) if each.pid != keep]
    alive = [process for process in left if process.lives()]
    for process in left:
        process.tell(signal.SIGKILL)
    until = time.monotonic() + KILL_AFTER
    while _reap() and any(process.lives() for process in left) and time.monotonic() < until:
        time.sleep(0.005)
    return len(alive)


def _reap() -> bool:
    """Whether this process has children left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _failure(fields: Mapping[str, object]) -> Failure:
    return Failure(
        rank=int(str(fields["rank"])),
        exitcode=int(str(fields["exitcode"])),
        text=str(fields["text"]).strip().partition("\n")[0][:500],
        time=float(str(fields["time"])),
        local_rank=int(str(fields.get("local_rank", -1))),
    )
