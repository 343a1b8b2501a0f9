"""The wire between two nodes: one JSON object a line, and a proof of the cluster token before a word is believed.

docs/design.md describes the messages. Everything read here may come from anybody who reaches the port: a line is
short, a text is printable, a number is in range, or it is a `WireError`.
"""

import asyncio
import contextlib
import hmac
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn

VERSION = 1
MAX_LINE = 1 << 16
"""Bytes. The longest honest line is the hello of a node with a list of 1,000 addresses (about 20 KB)."""
MAX_BACKLOG = 1 << 20
"""Bytes waiting for a peer that does not read; more, and it is dropped."""
SEGMENT = 1200
"""Bytes; fits the smallest MTU of IPv6, 1280."""
HANDSHAKE = 5.0
"""Seconds from a connection to a proven hello."""

PATIENCE = 3
"""HEARTBEAT_TIMEOUTs until the kernel gives a stuck connection up: presence is judged by what is heard, and one that
was stuck for a while must still be there when the link is back."""

Message = Mapping[str, object]


class WireError(Exception):
    """The other side said something that is not this protocol, or not from this cluster. The text is for the user."""


class UntrustedError(WireError):
    """The other side did not prove the cluster token."""


async def listen(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    address: str,
    port: int,
    backlog: int,
) -> asyncio.Server:
    """Node 0's ear. Its connections send small segments, both ways: a path that drops full-size packets must not keep
    a node from coming and being told so. Raises OSError."""
    server = await asyncio.start_server(serve, address, port, limit=MAX_LINE, backlog=backlog)
    for ear in server.sockets:
        ear.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
    return server


class Wire:
    """One connection, seen from one side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        peer = writer.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) else ""
        """The address of the other side; "" within one process."""

    def give_up_after(self, seconds: float) -> None:
        """Lets the kernel close the connection when sent bytes stay unacknowledged for so long."""
        sock = self._writer.get_extra_info("socket")
        if self.peer:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))

    def send(self, kind: str, **fields: object) -> None:
        """Queues one message; never waits. A peer that does not read is dropped."""
        if self._writer.is_closing():
            return
        self._writer.write(json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n")
        if self._writer.transport.get_write_buffer_size() > MAX_BACKLOG:
            self.abort()

    async def receive(self) -> Message:
        """The next message. Raises WireError for anything malformed, ConnectionError at the end."""
        try:
            line = await self._reader.readline()
        except ValueError:
            raise WireError(f"a line of more than {MAX_LINE} bytes") from None
        if not line.endswith(b"\n"):
            raise ConnectionResetError("its connection closed")
        return parse(line)

    async def expect(self, kind: str) -> Message:
        message = await self.receive()
        if text(message, "kind") != kind:
            raise WireError(f"{text(message, 'kind')!r} instead of {kind!r}")
        return message

    async def closed(self) -> None:
        """Waits until the other side hangs up, for a moment at most; what it still says is not heard."""
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(HANDSHAKE):
                while await self._reader.read(MAX_LINE):
                    pass

    def abort(self) -> None:
        """Closes at once, whatever waits to be sent."""
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()


def parse(line: bytes) -> Message:
    """One line as a message. Raises WireError for anything that is not a JSON object with a `kind`."""
    try:
        message = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise WireError("not a line of JSON") from None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise WireError("not a message of torchrun-compose")
    return message


def text(message: Message, name: str, limit: int = 500) -> str:
    """A field as printable text of at most `limit` characters: it ends up on terminals."""
    value = message.get(name)
    if not isinstance(value, str):
        raise WireError(f"{name} is not a text")
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in value[:limit])


def integer(message: Message, name: str, low: int, high: int) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise WireError(f"{name} is not a number from {low} to {high}")
    return value


def items(message: Message, name: str, limit: int) -> list[Message]:
    """A field as a list of at most `limit` objects."""
    value = message.get(name)
    if not isinstance(value, list) or len(value) > limit or not all(isinstance(item, dict) for item in value):
        raise WireError(f"{name} is not a list of at most {limit} objects")
    return value


async def challenge(wire: Wire, token: bytes) -> Message:
    """The listening side: proves the token, demands the proof, and returns the hello that came with it."""
    opening = await wire.expect("open")
    version, nonce = integer(opening, "v", 0, 1 << 30), text(opening, "nonce", 64)
    mine = secrets.token_hex(16)
    wire.send("challenge", v=VERSION, nonce=mine, proof=_proof(token, "server", nonce, mine))
    if version != VERSION:
        raise WireError(f"it speaks version {version} of the protocol, this node version {VERSION}")
    hello = await wire.expect("hello")
    if not hmac.compare_digest(text(hello, "proof").encode(), _proof(token, "client", mine, nonce).encode()):
        wire.send("refuse", code=7, text="this node's CLUSTER_TOKEN_FILE is not that of node 0")
        raise UntrustedError("it does not prove the cluster token")
    return hello


async def introduce(wire: Wire, token: bytes, hello: Mapping[str, object]) -> None:
    """The dialling side: believes nothing before the token is proven, then says hello."""
    nonce = secrets.token_hex(16)
    wire.send("open", v=VERSION, nonce=nonce)
    answer = await wire.expect("challenge")
    version, theirs = integer(answer, "v", 0, 1 << 30), text(answer, "nonce", 64)
    if version != VERSION:
        raise WireError(f"node 0 speaks version {version} of the protocol, this node version {VERSION}: use one image")
    proven = hmac.compare_digest(text(answer, "proof").encode(), _proof(token, "server", nonce, theirs).encode())
    # The hello goes out with a proof that cannot fit, so that node 0 can name this node; it tells nothing secret.
    wire.send("hello", proof=_proof(token, "client", theirs, nonce), **(hello if proven else {}))
    if not proven:
        _explain(token, has_proof=bool(answer.get("proof")))


def _explain(token: bytes, *, has_proof: bool) -> NoReturn:
    if token and not has_proof:
        raise UntrustedError("node 0 has no CLUSTER_TOKEN_FILE, this node has one. Give all nodes the same file.")
    if not token:
        raise UntrustedError("node 0 asks for a cluster token. Set CLUSTER_TOKEN_FILE to the file that node 0 has.")
    raise UntrustedError("CLUSTER_TOKEN_FILE differs from that of node 0. Copy the same file to all nodes.")


def _proof(token: bytes, side: str, first: str, second: str) -> str:
    return hmac.new(token, f"{side} {first} {second}".encode(), "sha256").hexdigest() if token else ""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)
