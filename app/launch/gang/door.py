"""The way in: whoever connects to node 0 proves itself and says hello, or goes."""

import asyncio

from app.launch.exitcodes import ExitCode
from app.launch.gang.messages import Hello, Pulse, read_hello
from app.launch.gang.verdict import Verdict
from app.launch.gang.wire import HANDSHAKE, PATIENCE, Message, Wire, WireError, challenge, integer, text
from app.launch.plan import Plan

UNPROVEN = 8
"""Connections that one address may have open before it has proven itself."""


class Door:
    """Puts into `inbox` what each connection says: a Hello first, then messages, at the end a text: why it ended."""

    def __init__(self, plan: Plan, token: bytes) -> None:
        self.inbox: asyncio.Queue[tuple[Wire, Hello | Pulse | Message | str]] = asyncio.Queue(maxsize=1000)
        self.verdict: Verdict | None = None
        """For those who come when the job has ended."""
        self._plan = plan
        self._token = token
        self._callers: dict[str, int] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from the handshake to its end."""
        wire = Wire(reader, writer)
        try:
            first = await self._admit(wire)
            await self.inbox.put((wire, first))
            if isinstance(first, Pulse):
                return await wire.closed()
            if self.verdict:
                wire.send("verdict", code=int(self.verdict.code), text=self.verdict.text)
            while True:
                await self.inbox.put((wire, await wire.receive()))
        except (WireError, OSError) as error:
            await self.inbox.put((wire, str(error)))
        except asyncio.CancelledError:
            pass  # the loop ends; Python 3.11's asyncio.streams would print a traceback of its own
        finally:
            wire.close()

    async def _admit(self, wire: Wire) -> Hello | Pulse:
        callers = self._callers
        if callers.get(wire.peer, 0) >= UNPROVEN or sum(callers.values()) >= 2 * len(self._plan.nodes) + 64:
            raise WireError("too many connections without a hello")
        callers[wire.peer] = callers.get(wire.peer, 0) + 1
        try:
            async with asyncio.timeout(HANDSHAKE):
                message = await challenge(wire, self._token)
        except TimeoutError:
            raise WireError(f"no hello within {HANDSHAKE:g} s") from None
        finally:
            callers[wire.peer] -= 1
            if not callers[wire.peer]:
                del callers[wire.peer]
        run = text(message, "run", 100)
        if run != self._plan.run_name:
            stranger = f"{self._plan.nodes[0]} port {self._plan.control_port} belongs to another job, run"
            cure = f"{self._plan.run_name!r}; this node's is {run!r}. Set the same RUN_NAME, or another MASTER_PORT."
            wire.send("refuse", code=int(ExitCode.DISAGREE), text=f"{stranger} {cure}")
            raise WireError(f"it belongs to another job, run {run!r}")
        if "pulse" in message:
            return Pulse(life=text(message, "pulse", 64))
        wire.give_up_after(PATIENCE * self._plan.heartbeat_timeout)
        # A node with a longer list must get a seat, or its list could not be shown next to ours.
        return read_hello(message, wire.peer, max(len(self._plan.nodes), integer(message, "nnodes", 1, 1 << 20)))
