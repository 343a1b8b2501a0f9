"""Tells the services of NOTIFY what happens to the job, one message for each event.

Every node learns of every event, and node 0 sends. What node 0 cannot tell is its own loss: then the lowest node that
is left speaks for it. The others find out who that is by CONTROL_PORT, on which a node listens while node 0 is lost.
Messages go out beside the event loop: a service that does not answer costs the job nothing.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from app.config.exitcodes import ExitCode
from app.gang.messages import JobEvent
from app.gang.verdict import Verdict
from app.plan import Plan
from app.plan.places import results
from app.supervise.files import off_loop

LIMIT = 20.0
"""Seconds that a service has for one message."""
LAST_MESSAGE = 10.0
"""Seconds that a launcher which has ended waits for messages on their way."""
NOTICED = 2.0
"""Seconds beyond HEARTBEAT_TIMEOUT after which every node has noticed that node 0 is lost."""
REACH = 2.0
LONGEST = 1500
MISSING = "apprise is not installed here: `pip install apprise`, or build the image anew"
TITLES = {
    "started": ("info", "started"),
    "restarting": ("warning", "failed, starts again"),
    "hang": ("warning", "hangs"),
    "lost": ("warning", "lost a node"),
    "finished": ("success", "finished"),
    "stopped": ("warning", "was stopped"),
    "failed": ("failure", "failed"),
    "test": ("info", "sends its messages here"),
}
"""Apprise's kind of a message, and what the run did."""
CLOSER = {
    "started": "look closer: `torchrun-compose watch`, or `entrypoint.py status` on a node",
    "hang": "look closer: `torchrun-compose stacks`, or `entrypoint.py stacks` on a node",
    "test": "",
}
DEFAULT_CLOSER = "look closer: `torchrun-compose report`, or `entrypoint.py report` and the log of the node named above"
Deliver = Callable[[str, str, str, str], str]
"""(service, kind, title, body): sends one message; returns what went wrong, or ""."""


def deliver(service: str, kind: str, title: str, body: str) -> str:
    """By Apprise, which tells of an address only whether it took the message."""
    try:
        import apprise  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return MISSING
    # It logs addresses.
    logging.getLogger("apprise").addHandler(logging.NullHandler())
    logging.getLogger("apprise").propagate = False
    sender = apprise.Apprise()
    if not sender.add(service):
        return "Apprise does not understand its address"
    return "" if sender.notify(title=title, body=body, notify_type=kind) else "it did not take the message"


def scheme(service: str) -> str:
    """What may be shown of an address."""
    return service.partition("://")[0]


class Notifier:
    """The messages of one node."""

    def __init__(
        self, plan: Plan, clean: Callable[[str], str], say: Callable[[str], None], deliver: Deliver = deliver
    ) -> None:
        """`clean` removes secrets."""
        self.told = False
        """This node has told that node 0 was lost."""
        self._plan, self._clean, self._say, self._deliver = plan, clean, say, deliver
        self._speaks = self._leads = plan.nodes.rank == 0
        self._unsent: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._failing = dict[str, str]()
        self._sending = asyncio.ensure_future(self._send())
        self._deputy: asyncio.Task[None] | None = None
        """Speaks for node 0, if no lower node does."""
        self._decided = asyncio.Event()

    def take(self, event: JobEvent) -> None:
        """What happens to the job."""
        if event.kind == "node-0-found":
            self._stand_down()
        elif event.kind == "node-0-lost" and not self._leads:
            self._stand_down()
            self._deputy = asyncio.ensure_future(self._speak_for_node_0(event.text))
        elif self._leads:
            kind = "lost" if event.kind == "back" or event.cause == "lost" else event.kind
            if kind in TITLES:
                self._unsent.put_nowait((kind, event.text))

    async def finish(self, verdict: Verdict) -> None:
        """Tells the end, and waits a little until everything is sent."""
        kinds = {ExitCode.DONE: "finished", ExitCode.STOPPED: "stopped"}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_MESSAGE + (self._patience if self._deputy else 0.0)):
                if self._deputy:
                    await self._decided.wait()
                if self._speaks:
                    self._unsent.put_nowait((kinds.get(verdict.code, "failed"), verdict.text))
                await self._unsent.join()
        self._stand_down()
        self._sending.cancel()

    @property
    def _patience(self) -> float:
        return self._plan.timeouts.heartbeat + NOTICED

    def _stand_down(self) -> None:
        """Node 0 is there again, and speaks for itself."""
        if self._deputy:
            self._deputy.cancel()
        self._deputy, self._speaks, self.told = None, self._leads, False
        self._decided.clear()

    async def _speak_for_node_0(self, told: str) -> None:
        network, server = self._plan.network, None
        try:
            with contextlib.suppress(OSError):
                server = await asyncio.start_server(_hang_up, network.address, network.control_port)
            await asyncio.sleep(self._patience)
            lower = self._plan.nodes.addresses[1 : self._plan.nodes.rank]
            self._speaks = not any(await asyncio.gather(*map(self._is_left, lower)))
            if self._speaks:
                self.told = True
                self._unsent.put_nowait(("lost", told))
            self._decided.set()
            # Higher nodes may ask a moment later.
            await asyncio.Event().wait()
        finally:
            if server:
                server.close()

    async def _is_left(self, address: str) -> bool:
        """Whether a lower node lives and knows that node 0 is lost. Where its address is not known, it is left the
        word."""
        if not address:
            return True
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(REACH):
                _, writer = await asyncio.open_connection(address, self._plan.network.control_port)
                writer.close()
                return True
        return False

    async def _send(self) -> None:
        while True:
            kind, told = await self._unsent.get()
            nature, what = TITLES[kind]
            title = f"torchrun-compose: {self._plan.run_name} {what}"
            body = self._clean(message(self._plan, kind, told))
            try:
                services = self._plan.monitoring.notify
                await asyncio.gather(*(self._send_to(service, nature, title, body) for service in services))
            finally:
                self._unsent.task_done()

    async def _send_to(self, service: str, nature: str, title: str, body: str) -> None:
        try:
            why = await off_loop(lambda: self._deliver(service, nature, title, body), LIMIT)
        except Exception as error:  # Whatever a service's code does: the job goes on.
            why = f"no answer within {LIMIT:.0f} s" if isinstance(error, TimeoutError) else type(error).__name__
        if why and self._failing.get(service) != why:
            self._say(f"warning: no message to {scheme(service)} (NOTIFY): {why}. The job goes on without")
        self._failing[service] = why


async def _hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


def message(plan: Plan, kind: str, told: str) -> str:
    """What happened, where, and how to look closer."""
    rank, count = plan.nodes.rank, plan.nodes.count
    where = f"told by node {rank} of {count} ({plan.network.address}) of run {plan.run_name}"
    closer = f"results: {results(plan.script)}" if kind == "finished" else CLOSER.get(kind, DEFAULT_CLOSER)
    return "\n".join(filter(None, [told[:LONGEST], where, closer]))
