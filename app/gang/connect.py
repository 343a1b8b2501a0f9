"""How a node comes to node 0: it connects and says hello, again and again, and says for whom it waits."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from app.gang import probes
from app.gang.connection import Connection, ProtocolError, UntrustedError
from app.gang.handshake import HANDSHAKE
from app.gang.messages import Say

SAY_AFTER, SAY_EVERY = 2.0, 10.0
RETRY = 1.0
"""Longest pause in seconds between two tries to connect."""


class NoAnswerError(Exception):
    """Node 0 did not let this node in within its time; the text is why."""


class BusyError(ProtocolError):
    """Node 0 is at something else, and this node is to try again."""


class Waiting:
    """Says for whom this node waits: after a while, then now and again, and on a change, once a second at most."""

    def __init__(self, seconds: float, say: Say, start: float = 0.0) -> None:
        """`start` is monotonic, now if it is not given."""
        self.start = start or time.monotonic()
        self.until = self.start + seconds
        self._say = say
        self._said = (0.0, "")
        self._asked = 0.0

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    def tell(self, name: Callable[[], str]) -> None:
        """`name` tells for whom; it is asked once a second at most, since on a large cluster it takes a while."""
        now, (at, last) = time.monotonic(), self._said
        if now <= max(self.start + SAY_AFTER, self._asked + 1.0):
            return
        self._asked, what = now, name()
        if what != last or now > at + SAY_EVERY:
            self._said = (now, what)
            end = time.strftime("%H:%M:%S UTC", time.gmtime(time.time() + self.until - now))
            self._say(f"waiting {now - self.start:.0f} s for {what} (until {end})")


async def connect(
    greet: Callable[[], Awaitable[Connection]], node0: str, waiting: Waiting, rest: Callable[[float], Awaitable[bool]]
) -> Connection | None:
    """Connects and says hello until it works; None once `rest` says that this node's own user has ended it.

    Raises:
        UntrustedError: the token differs.
        NoAnswerError: the time is over.
    """
    pause, why = 0.02, ""

    def whom() -> str:
        return f"{node0}: {why}"

    while True:
        try:
            async with asyncio.timeout(probes.CONNECT + HANDSHAKE):
                return await greet()
        except UntrustedError:
            raise
        except BusyError as error:
            why = str(error)
        except ProtocolError as error:
            why = f"something else answers there ({error})"
        except (OSError, TimeoutError) as error:
            why = probes.why(error)
        if waiting.over:
            raise NoAnswerError(why)
        waiting.tell(whom)
        if await rest(pause):
            return None
        pause = min(2 * pause, RETRY)
