"""A connection between two nodes: one JSON object a line, each with a MAC once the handshake is over.

docs/gang.md describes the messages. Everything read here may come from anybody who reaches the port: a line is
short, a text is printable, a number is in range, or it is a `ProtocolError`.
"""

import asyncio
import contextlib
import hmac
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address
from typing import NoReturn

MAX_LINE = 1 << 16
"""Bytes. The longest honest line is the hello of a node with a list of 1,000 addresses (about 20 KB)."""
MAX_BACKLOG = 1 << 20
"""Bytes waiting for a peer that does not read; more, and it is dropped."""
SEGMENT = 536
"""Bytes; fits what every path has to carry, also a tunnel inside a tunnel (RFC 879: packets of 576)."""
PATIENCE = 3
"""HEARTBEAT_TIMEOUTs until the kernel gives a stuck connection up: presence is judged by what is heard, and one that
was stuck for a while must still be there when the link is back."""
MAC = 32
"""Characters of a line's MAC: 128 bits of HMAC-SHA256 in hexadecimal."""

Message = Mapping[str, object]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ProtocolError(Exception):
    """The other side said something that is not this protocol, or not from this cluster. The text is for the user."""


class UntrustedError(ProtocolError):
    """The other side did not prove the cluster token."""


class Connection:
    """One connection, seen from one side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._send_key = self._receive_key = b""
        self._sent = self._received = 0
        self.here, self.there = _end(writer, "sockname"), _end(writer, "peername")
        """`address:port` of this and of the other side; "" within one process."""
        self.peer = self.there.rpartition(":")[0]
        """The address of the other side; "" within one process."""

    def authenticate(self, send_key: bytes, receive_key: bytes) -> None:
        """From here on every line carries a MAC over its direction (a key each), its number and its text."""
        self._send_key, self._receive_key = send_key, receive_key

    def give_up_after(self, seconds: float) -> None:
        """Lets the kernel close the connection when sent bytes stay unacknowledged for so long."""
        sock = self._writer.get_extra_info("socket")
        if self.peer:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(round(seconds * 1000), 2**31 - 1))

    def send(self, kind: str, **fields: object) -> None:
        """Queues one message; never waits. A peer that does not read is dropped."""
        if self._writer.is_closing():
            return
        line = json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode()
        if self._send_key:
            line = _mac(self._send_key, self._sent, line) + line
            self._sent += 1
        self._writer.write(line + b"\n")
        if self._writer.transport.get_write_buffer_size() > MAX_BACKLOG:
            self.abort()

    async def receive(self) -> Message:
        """The next message. Raises ProtocolError for anything malformed or forged, ConnectionError at the end."""
        try:
            line = await self._reader.readline()
        except ValueError:
            raise ProtocolError(f"a line of more than {MAX_LINE} bytes") from None
        if not line.endswith(b"\n"):
            raise ConnectionResetError("its connection closed")
        if self._receive_key:
            mac, line = line[:MAC], line[MAC:-1]
            if not hmac.compare_digest(mac, _mac(self._receive_key, self._received, line)):
                raise UntrustedError("a line that was changed or added on the way")
            self._received += 1
        return parse(line)

    async def expect(self, kind: str) -> Message:
        message = await self.receive()
        if text(message, "kind") != kind:
            raise ProtocolError(f"{text(message, 'kind', 40)!r} instead of {kind!r}")
        return message

    async def closed(self) -> None:
        """Waits until the other side hangs up, for a moment at most; what it still says is ignored."""
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(5):
                while await self._reader.read(MAX_LINE):
                    pass

    def abort(self) -> None:
        """Closes at once, whatever waits to be sent."""
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()


async def listen(serve: Serve, address: str, port: int, nodes: int) -> asyncio.Server:
    """The coordinator's listening socket. Its connections send small segments, both ways: a path that drops full-size
    packets must not keep a node from coming and being told so. Raises OSError."""
    server = await asyncio.start_server(serve, address, port, limit=MAX_LINE, backlog=2 * nodes + 64)
    for each in server.sockets:
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
    return server


async def dial(own: str, address: str, port: int) -> Connection:
    """Connects from the address `own`. Raises OSError."""
    return Connection(*await asyncio.open_connection(address, port, local_addr=(own, 0), limit=MAX_LINE))


def dial_inside(serve: Serve) -> Callable[[], Awaitable[Connection]]:
    """Node 0 takes part in its own job over a pair of sockets that nobody else can reach."""
    tasks = set[asyncio.Future[None]]()

    async def connect() -> Connection:
        here, there = socket.socketpair()
        tasks.add(asyncio.ensure_future(serve(*await asyncio.open_connection(sock=there, limit=MAX_LINE))))
        return Connection(*await asyncio.open_connection(sock=here, limit=MAX_LINE))

    return connect


def parse(line: bytes) -> Message:
    """One line as a message. Raises ProtocolError for anything that is not a JSON object with a `kind`."""
    try:
        message = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ProtocolError("not a line of JSON") from None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ProtocolError("not a message of torchrun-compose")
    return message


def text(message: Message, name: str, limit: int = 500, *, lines: bool = False) -> str:
    """A field as printable text of at most `limit` characters, since it ends up on terminals; of one line, unless
    node 0 itself wrote it (`lines`): others could make lines up that look like ours."""
    value = message.get(name)
    if not isinstance(value, str):
        raise ProtocolError(f"{name} is not a text")
    return printable(value[:limit], lines=lines)


def printable(value: str, *, lines: bool = False) -> str:
    if not lines:
        value = value.replace("\n", " ")
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in value)


def integer(message: Message, name: str, low: int, high: int) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ProtocolError(f"{name} is not a number from {low} to {high}")
    return value


def items(message: Message, name: str, limit: int) -> list[Message]:
    """A field as a list of at most `limit` objects."""
    value = message.get(name)
    if not isinstance(value, list) or len(value) > limit or not all(isinstance(item, dict) for item in value):
        raise ProtocolError(f"{name} is not a list of at most {limit} objects")
    return value


def _mac(key: bytes, number: int, line: bytes) -> bytes:
    return hmac.new(key, number.to_bytes(8, "big") + line, "sha256").hexdigest()[:MAC].encode()


def _end(writer: asyncio.StreamWriter, which: str) -> str:
    name = writer.get_extra_info(which)
    # One address has many spellings in IPv6, and a link-local one a zone that only its own machine knows.
    return f"{ip_address(name[0].partition('%')[0])}:{name[1]}" if isinstance(name, tuple) else ""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)
