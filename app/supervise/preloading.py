"""The job's preloaded process, started as soon as there is a plan: whatever else the launcher needs to know it learns
while that one loads torch. So this file imports little."""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from app.config.console import say
from app.config.exitcodes import ExitCode
from app.engine.command import environment
from app.engine.warm import Preloaded
from app.plan import Plan

MOST_FILES = 65_536
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""All stop the job. Only the main thread takes them, which blocks them for its last moments."""


@contextlib.contextmanager
def preloaded(plan: Plan, clean: Callable[[str], str]) -> Iterator[Preloaded]:
    """What PRELOAD names begins to be loaded before the nodes meet, as that takes long. `clean` removes secrets."""

    def tell(name: str, why: str) -> None:
        from app.report.history import keep_left_out
        from app.supervise.files import start_thread

        why = clean(why)
        say(f"PRELOAD: left out {name}: {why}")
        start_thread(lambda: keep_left_out(plan, name, why), "history")

    for number in SIGNALS:
        signal.signal(number, _leave)
    allow_many_files()
    process = Preloaded(plan.script.preload, environment(plan, os.environ, run_id=""), tell)
    try:
        process.start()
        yield process
    finally:
        process.stop()


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    """A stop before the event loop takes them."""
    sys.exit(ExitCode.STOPPED)


def allow_many_files() -> None:
    """Raises the soft limit of open files as far as it goes: 1,024, Docker's usual one, is less than 1,000 nodes and
    the data loaders of one node need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
