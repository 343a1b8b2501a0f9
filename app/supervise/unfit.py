"""A node that cannot start tells node 0 why, so that the others do not wait for it until START_TIMEOUT."""

import asyncio
import contextlib
from pathlib import Path

from app.config.settings import Settings
from app.gang.connection import MAX_LINE, Connection, ProtocolError
from app.gang.handshake import introduce
from app.supervise.files import in_time

LIMIT = 4.0
"""Seconds; the user waits for the sentence that follows."""


def tell_node_0(settings: Settings, why: str) -> None:
    """Best effort: where node 0 is not known, does not run yet or does not answer, nothing is told. Never raises."""
    first = settings.text("NODES").partition(",")[0].strip()
    if "," not in settings.text("NODES") or not first:
        return
    with contextlib.suppress(OSError, ValueError, ProtocolError):
        in_time(lambda: asyncio.run(_tell(settings, first, why)), LIMIT)


async def _tell(settings: Settings, address: str, why: str) -> None:
    master = int(settings.text("MASTER_PORT"))
    port = int(settings.text("CONTROL_PORT") or master + 1)
    path = settings.text("CLUSTER_TOKEN_FILE")
    token = Path(path).read_bytes().strip() if path else b""
    connection = Connection(*await asyncio.open_connection(address, port, limit=MAX_LINE))
    try:
        # Without it node 0 knows the node by its address.
        rank = int(settings.text("NODE_RANK") or -1)
        hello = {"run": settings.text("RUN_NAME"), "job": "training", "unfit": why[:2000], "rank": rank}
        await introduce(connection, token, hello)
        await connection.closed()
    finally:
        connection.close()
