"""Every act on files has a limit and a thread of its own: a file server that is gone blocks whoever asks it, for ever.

The threads are daemons: one that never comes back does not keep the launcher from its end."""

import asyncio
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from app.supervise.preloading import SIGNALS

Result = TypeVar("Result")


def start_thread(act: Callable[[], object], name: str) -> None:
    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        act()

    threading.Thread(target=run, name=name, daemon=True).start()


def in_time(act: Callable[[], Result], limit: float) -> Result:
    """What `act` returns or raises. Raises TimeoutError, an OSError, after `limit` seconds; `act` then goes on."""
    return _started(act).result(limit)


async def off_loop(act: Callable[[], Result], limit: float) -> Result:
    """The same, while the event loop goes on."""
    # Python 3.11's wait_for swallows a cancel that comes as the awaited ends.
    async with asyncio.timeout(limit):
        return await asyncio.shield(asyncio.wrap_future(_started(act)))


def _started(act: Callable[[], Result]) -> Future[Result]:
    future = Future[Result]()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(act())
        except BaseException as error:  # It is the caller's.
            future.set_exception(error)

    start_thread(run, "files")
    return future
