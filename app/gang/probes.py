"""Verifies that nodes can connect to each other: every node listens on random ports, and its peers dial them."""

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass

CONNECT = 3.0
"""Seconds for a connection: long enough for one lost SYN."""
PASS = 4.0
"""Seconds for the payload to pass both ways once connected."""
PAYLOAD = bytes(72 * 1024)
"""More than one packet of the largest MTU in use (65,520 bytes, IP over InfiniBand), so full-size packets must pass."""
OPEN = 40.0
"""Seconds that a node listens for its peers if node 0 does not end the test before."""
LISTENERS = 2
CALLERS = 2048
"""Answered at a time: on a large cluster every node dials node 0 at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A peer's listener."""

    rank: int
    address: str
    port: int
    key: str


class ProbeListener:
    """This node's listening sockets for one test: they answer whoever knows `key`, and nobody else."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.ports: list[int] = []
        self._servers: list[asyncio.Server] = []
        self._busy = 0

    async def open(self, address: str, fixed: Sequence[int] = ()) -> None:
        """Listens on random ports and on those of `fixed` (node 0: the port torchrun will need), for OPEN seconds at
        most. Raises OSError."""
        self.close()
        asyncio.get_running_loop().call_later(OPEN, self.close)
        for port in [*fixed, *[0] * LISTENERS]:
            server = await asyncio.start_server(self._answer, address, port, limit=4096, backlog=CALLERS)
            self._servers.append(server)
            self.ports.append(int(server.sockets[0].getsockname()[1]))

    def close(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()
        self.ports.clear()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._busy += 1
        # CancelledError: the loop ends; Python 3.11's asyncio.streams would print a traceback of its own.
        with contextlib.suppress(OSError, ValueError, TimeoutError, EOFError, asyncio.CancelledError):
            async with asyncio.timeout(CONNECT + PASS):
                # A stranger without the key gets no byte back.
                if self._busy <= CALLERS and secrets.compare_digest(
                    (await reader.readline()).strip(), self.key.encode()
                ):
                    writer.write(b"here\n")
                    await reader.readexactly(len(PAYLOAD))
                    writer.write(PAYLOAD)
                    await writer.drain()
                    await reader.read(1)
        self._busy -= 1
        writer.close()


def try_port(port: int) -> None:
    """Raises OSError if torchrun's store could not listen on `port`: it does on all interfaces, whatever MASTER_ADDR
    says (c10d/TCPStoreLibUvBackend.cpp), so a listener on any address of this machine is in its way."""
    with socket.create_server(("", port)):
        pass


def allow(source: str, target: str = "") -> str:
    """The command, for the machine with the address `target`, that lets TCP from `source` in."""
    tool = "ip6tables" if ":" in source else "iptables"
    towards = f" -d {target}" if target else ""
    return f"sudo {tool} -I INPUT -p tcp -s {source}{towards} -j ACCEPT"


async def dial_all(own: str, found: Sequence[Target]) -> list[tuple[Target, str]]:
    """Dials all targets; returns those that failed with the reason."""
    reasons = await asyncio.gather(*(dial(own, target) for target in found))
    return [(target, reason) for target, reason in zip(found, reasons, strict=True) if reason]


async def dial(own: str, target: Target) -> str:
    """Connects to one target and sends a full-size payload both ways; returns "" or what went wrong."""
    try:
        async with asyncio.timeout(CONNECT):
            reader, writer = await asyncio.open_connection(target.address, target.port, local_addr=(own, 0))
    except (OSError, TimeoutError) as error:
        return why(error)
    try:
        async with asyncio.timeout(PASS):
            writer.write(target.key.encode() + b"\n")
            if await reader.readline() != b"here\n":
                return "connects, but what answers is not this job's node"
            writer.write(PAYLOAD)
            await reader.readexactly(len(PAYLOAD))
    except TimeoutError:
        return "connects, but full-size packets do not pass: a smaller MTU on the way? Compare `ip link` of both nodes"
    except (OSError, EOFError) as error:
        return f"connects, then breaks off ({type(error).__name__})"
    finally:
        writer.transport.abort()
    return ""


async def absence(address: str, port: int) -> str:
    """Why the node at `address` is missing. Nobody listens on `port` there: the kind of refusal is the news."""
    try:
        async with asyncio.timeout(CONNECT):
            _, writer = await asyncio.open_connection(address, port)
    except ConnectionRefusedError as error:
        return f"{why(error)} (the machine is up; not started there, or it cannot reach node 0)"
    except (OSError, TimeoutError) as error:
        return why(error)
    writer.close()
    return "something else listens on its CONTROL_PORT"


def why(error: BaseException) -> str:
    """A connection's failure in a few words, the same on every node."""
    if isinstance(error, TimeoutError):
        return "no answer (machine down, or a firewall drops it)"
    number = getattr(error, "errno", None)
    # asyncio puts the address into strerror, which would make every line of a table different.
    return os.strerror(number).lower() if number else str(error)
