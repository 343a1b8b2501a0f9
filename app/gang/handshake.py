"""Admission: both sides of a connection prove the cluster token, then the node says who it is; or it is closed.

The dialling side proves itself first, the listening side only to a proven peer. Each proof and the keys of all later
lines are made of the token, the side, both socket addresses (the listening one is NODES[0]:CONTROL_PORT) and both
nonces, so that a proof is of no use on any other connection. Where a node of either side is listed under an address
that it does not have itself (address translation, NODE_RANK set by hand), the two sides see different addresses, and a
word that both prove stands in their place. Without a token the same happens with an empty one, which keeps nobody out.
"""

import asyncio
import hmac
import json
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from app.gang.connection import Connection, Message, ProtocolError, UntrustedError, integer, text
from app.plan import Plan

VERSION = 2
HANDSHAKE = 5.0
"""Seconds from a connection to an authenticated hello."""
PENDING = 8
"""Connections that one address may have open before it has proven itself."""
STRANGERS = 64
"""Such connections of all addresses that are not in NODES; those that are have places of their own."""


@dataclass(slots=True, kw_only=True)
class Admission:
    """The listening side. Counts the connections that have not proven themselves yet."""

    plan: Plan
    token: bytes
    _pending: Counter[str] = field(default_factory=Counter)

    async def admit(self, connection: Connection) -> Message:
        """The hello of a node of this job. Raises ProtocolError for anybody else, OSError if it hangs up."""
        peer, listed = connection.peer, {"", *self.plan.nodes.addresses}
        strangers = sum(count for address, count in self._pending.items() if address not in listed)
        if self._pending[peer] >= PENDING or (peer not in listed and strangers >= STRANGERS):
            raise ProtocolError("too many connections without a handshake")
        self._pending[peer] += 1
        try:
            async with asyncio.timeout(HANDSHAKE):
                message = await accept(connection, self.token, translated=is_translated(self.plan))
        except TimeoutError:
            raise ProtocolError(f"no handshake within {HANDSHAKE:g} s") from None
        finally:
            self._pending[peer] -= 1
            if not self._pending[peer]:
                del self._pending[peer]
        return message


def is_translated(plan: Plan) -> bool:
    """Whether this node is listed under an address that it does not have."""
    return plan.nodes.addresses[plan.nodes.rank] not in ("", plan.network.address)


async def accept(connection: Connection, token: bytes, *, translated: bool = False) -> Message:
    """The listening side: demands the proof, gives its own, and returns the hello."""
    opening = await connection.expect("open")
    version, nonce = integer(opening, "v", 0, 1 << 30), text(opening, "nonce", 64)
    mine = secrets.token_hex(16)
    connection.send("challenge", v=VERSION, nonce=mine, token=bool(token), seen=connection.there, translated=translated)
    if version != VERSION:
        raise ProtocolError(f"it speaks version {version} of the protocol, this node version {VERSION}: use one image")
    told = await connection.expect("proof")
    own, either = text(told, "here", 64), translated or told.get("translated") is True
    keys = _Keys.make(token, connection.there, connection.here, nonce, mine, translated=either)
    if not hmac.compare_digest(text(told, "proof", 64).encode(), keys.client_proof.encode()):
        connection.send("refuse")
        if own != connection.there and not either:
            raise UntrustedError(_translated(own, connection.there))
        raise UntrustedError("its CLUSTER_TOKEN_FILE is not that of node 0")
    connection.send("welcome", proof=keys.server_proof)
    connection.authenticate(send_key=keys.to_client, receive_key=keys.to_server)
    return await connection.expect("hello")


async def introduce(
    connection: Connection, token: bytes, hello: Mapping[str, object], *, translated: bool = False
) -> None:
    """The dialling side: says nothing but its proof before the other side has proven the token, then says hello."""
    nonce = secrets.token_hex(16)
    connection.send("open", v=VERSION, nonce=nonce)
    answer = await connection.expect("challenge")
    version, theirs = integer(answer, "v", 0, 1 << 30), text(answer, "nonce", 64)
    if version != VERSION:
        raise ProtocolError(f"node 0 speaks version {version} of the protocol, this node {VERSION}: use one image")
    has_token, seen = answer.get("token") is True, text(answer, "seen", 64)
    either = translated or answer.get("translated") is True
    keys = _Keys.make(token, connection.here, connection.there, nonce, theirs, translated=either)
    # Also a proof that cannot fit is sent, so that node 0 can name this node at once.
    connection.send("proof", proof=keys.client_proof, here=connection.here, translated=translated)
    welcome = await connection.receive()
    if welcome["kind"] != "welcome" or not hmac.compare_digest(
        text(welcome, "proof", 64).encode(), keys.server_proof.encode()
    ):
        raise UntrustedError(_untrusted(token, has_token=has_token, seen=seen, own=connection.here))
    connection.authenticate(send_key=keys.to_server, receive_key=keys.to_client)
    connection.send("hello", **hello)


def _untrusted(token: bytes, *, has_token: bool, seen: str, own: str) -> str:
    if token and not has_token:
        return "node 0 has no CLUSTER_TOKEN_FILE, this node has one. Give all nodes the same file."
    if has_token and not token:
        return "node 0 asks for a cluster token. Set CLUSTER_TOKEN_FILE to the file that node 0 has."
    if seen != own:
        return _translated(own, seen)
    return "CLUSTER_TOKEN_FILE differs from that of node 0. Copy the same file to all nodes."


def _translated(own: str, seen: str) -> str:
    return f"its address {own} arrives at node 0 as {seen}: a NAT or proxy that NODES does not tell of is between them"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keys:
    """All that the two sides make of the token for one connection."""

    client_proof: str
    server_proof: str
    to_server: bytes
    to_client: bytes

    @classmethod
    def make(cls, token: bytes, client: str, server: str, first: str, second: str, *, translated: bool) -> "_Keys":
        # JSON keeps the parts apart, whatever they contain.
        ends = ["translated"] if translated else [client, server]
        context = json.dumps(["torchrun-compose", VERSION, *ends, first, second]).encode()

        def derive(purpose: str) -> bytes:
            return hmac.new(token, purpose.encode() + b"\0" + context, "sha256").digest()

        return cls(
            client_proof=derive("client proof").hex(),
            server_proof=derive("server proof").hex(),
            to_server=derive("lines to the server"),
            to_client=derive("lines to the client"),
        )
