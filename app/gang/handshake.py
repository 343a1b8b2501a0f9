"""The way in: whoever connects to node 0 proves itself and says hello to this job, or goes."""

import asyncio

from app.config.exitcodes import ExitCode
from app.gang.connection import HANDSHAKE, Message, Wire, WireError, challenge, text
from app.plan import Plan

UNPROVEN = 8
"""Connections that one address may have open before it has proven itself."""


class Door:
    """Counts those who have not proven themselves yet."""

    def __init__(self, plan: Plan, token: bytes) -> None:
        self._plan = plan
        self._token = token
        self._callers: dict[str, int] = {}

    async def admit(self, wire: Wire) -> Message:
        """The hello of a node of this job. Raises WireError for anybody else, OSError if it hangs up."""
        callers = self._callers
        if callers.get(wire.peer, 0) >= UNPROVEN or sum(callers.values()) >= 2 * self._plan.nodes.count + 64:
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
            stranger = (
                f"{self._plan.nodes.addresses[0]} port {self._plan.network.control_port} belongs to another job, run"
            )
            cure = f"{self._plan.run_name!r}; this node's is {run!r}. Set the same RUN_NAME, or another MASTER_PORT."
            wire.send("refuse", code=int(ExitCode.DISAGREE), text=f"{stranger} {cure}")
            raise WireError(f"it belongs to another job, run {run!r}")
        return message
