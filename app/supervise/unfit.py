"""A node that cannot start tells node 0 why, so that the others do not wait for it until START_TIMEOUT."""

import asyncio
import contextlib

from app.config.settings import Settings
from app.gang.connection import MAX_LINE, Connection, ProtocolError
from app.gang.handshake import introduce
from app.supervise.files import in_time

LIMIT = 4.0
"""Seconds; the user waits for the sentence that follows."""


def tell_node_0(settings: Settings, why: str) -> None:
    """Best effort: where node 0 is not known, does not run yet or does not answer, nothing is told. Never raises."""
    nodes = settings.nodes.value if settings.nodes else ()
    if len(nodes) < 2:
        return
    with contextlib.suppress(OSError, ValueError, ProtocolError):
        in_time(lambda: asyncio.run(_tell(settings, nodes[0], why)), LIMIT)


async def _tell(settings: Settings, address: str, why: str) -> None:
    port = settings.control_port.value if settings.control_port else settings.master_port.value + 1
    token = settings.cluster_token_file.value.read_bytes().strip() if settings.cluster_token_file else b""
    connection = Connection(*await asyncio.open_connection(address, port, limit=MAX_LINE))
    try:
        # Without it node 0 knows the node by its address.
        rank = settings.node_rank.value if settings.node_rank else -1
        hello = {"run": settings.run_name.value, "job": "training", "unfit": why[:2000], "rank": rank}
        await introduce(connection, token, hello, translated=await is_translated(settings, rank, connection.here))
        await connection.closed()
    finally:
        connection.close()


async def is_translated(settings: Settings, rank: int, here: str) -> bool:
    """Whether this node, which has no plan to tell it, is listed under an address that it does not have."""
    nodes = settings.nodes.value if settings.nodes else ()
    resolve = asyncio.get_running_loop().getaddrinfo
    found = await asyncio.gather(*(resolve(node, None) for node in (nodes[rank : rank + 1] if rank >= 0 else nodes)))
    return here.rpartition(":")[0] not in {str(each[4][0]) for listed in found for each in listed}
