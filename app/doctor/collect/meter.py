"""What a pair of nodes gives: round-trip time, TCP bandwidth both ways, and whether packets of full size pass.

Plain blocking sockets in threads: asyncio's streams would measure themselves. Every exchange is bounded in time.
"""

import contextlib
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

SECONDS = 0.6
"""Of sending in each direction."""
CONNECT = 3.0
PATIENCE = 5.0
"""Seconds after which a silent peer is given up."""
PINGS = 40
BLOCK = bytes(1 << 20)
SMALL = 64
UDP_TRIES = 4
UDP_WAIT = 0.25
HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}
"""Bytes of IP and UDP before the payload."""
LARGEST = 65507
# Linux's numbers (linux/in.h, linux/in6.h); Python names them only since 3.13. PROBE: never fragment, trust no cache.
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_PROBE = 10, 23, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Where a node's meter listens."""

    address: str
    tcp: int
    udp: int
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    rtt: float
    """Seconds, the shortest of PINGS."""
    out: float
    """Bytes per second towards the peer, as the peer received them."""
    back: float
    own: float = 0.0
    """What the measuring node reached with itself at the same time; 0 if that was not tried. Less is no fault of the
    network."""


class Meter:
    """This node's ear. It answers whoever knows `key`, and nobody else; `close` ends it."""

    def __init__(self, address: str) -> None:
        family = _family(address)
        self.key = secrets.token_hex(16)
        self._tcp = socket.create_server((address, 0), family=family, backlog=64)
        self._udp = socket.socket(family, socket.SOCK_DGRAM)
        self._udp.bind((address, 0))
        self.tcp = int(self._tcp.getsockname()[1])
        self.udp = int(self._udp.getsockname()[1])
        for work in (self._accept, self._echo):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        for ear in (self._tcp, self._udp):
            # A thread that waits in accept or recvfrom is woken by shutdown, not by close.
            with contextlib.suppress(OSError):
                ear.shutdown(socket.SHUT_RDWR)
            ear.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._tcp.accept()
                threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _echo(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = self._udp.recvfrom(1 << 16)
                if not sender:
                    return
                if secrets.compare_digest(data[: len(self.key)], self.key.encode()):
                    self._udp.sendto(f"{self.key} {len(data)}".encode(), sender)

    def _serve(self, caller: socket.socket) -> None:
        with caller, contextlib.suppress(OSError, ValueError):
            caller.settimeout(PATIENCE)
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            key, _, mode = _line(caller).partition(b" ")
            if not secrets.compare_digest(key, self.key.encode()):
                return
            if mode == b"ping":
                while byte := caller.recv(1):
                    caller.sendall(byte)
            elif mode == b"take":
                count, seconds = _receive(caller)
                caller.sendall(f"{count} {round(seconds * 1e6)}\n".encode())
                # A close with unread bytes would reset the connection, and the answer with it.
                end = time.monotonic() + PATIENCE
                while time.monotonic() < end and caller.recv(len(BLOCK)):
                    pass
            elif mode == b"give":
                end = time.monotonic() + PATIENCE
                while time.monotonic() < end:
                    caller.sendall(BLOCK)


def measure(own: str, peer: Peer) -> Speed:
    """Round trip and bandwidth both ways. Raises OSError or ValueError when the peer cannot be measured."""
    with _dial(own, peer, "ping") as wire:
        rtt = min(_ping(wire) for _ in range(PINGS))
    with _dial(own, peer, "take") as wire:
        out = _send(wire)
    with _dial(own, peer, "give") as wire:
        count, seconds = _receive(wire)
    return Speed(rtt=rtt, out=out, back=count / seconds)


def full_size(own: str, peer: Peer, mtu: int) -> str:
    """Whether packets of `mtu` bytes reach the peer: `passes`, `lost`, or `unknown` where not even small ones do."""
    family = _family(own)
    size = min(mtu - headers(own), LARGEST)
    with socket.socket(family, socket.SOCK_DGRAM) as wire:
        wire.bind((own, 0))
        level, option = (
            (socket.IPPROTO_IP, IP_MTU_DISCOVER)
            if family == socket.AF_INET
            else (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER)
        )
        wire.setsockopt(level, option, PMTUDISC_PROBE)
        wire.connect((peer.address, peer.udp))
        wire.settimeout(UDP_WAIT)
        if not _answered(wire, peer.key, SMALL):
            return "unknown"
        return "passes" if _answered(wire, peer.key, size) else "lost"


def _answered(wire: socket.socket, key: str, size: int) -> bool:
    packet = key.encode().ljust(size, b".")
    expected = f"{key} {size}".encode()
    for _ in range(UDP_TRIES):
        # A closed port (ICMP) and a packet larger than the interface's own MTU are errors of `send` or `recv`.
        with contextlib.suppress(OSError):
            wire.send(packet)
            if wire.recv(200) == expected:
                return True
    return False


@contextlib.contextmanager
def _dial(own: str, peer: Peer, mode: str) -> Iterator[socket.socket]:
    with socket.create_connection((peer.address, peer.tcp), timeout=CONNECT, source_address=(own, 0)) as wire:
        wire.settimeout(PATIENCE)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.sendall(f"{peer.key} {mode}\n".encode())
        yield wire
        # Whatever is still queued is of no use: close at once.
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _ping(wire: socket.socket) -> float:
    start = time.perf_counter()
    wire.sendall(b".")
    if not wire.recv(1):
        raise ConnectionResetError("the meter hung up")
    return time.perf_counter() - start


def _send(wire: socket.socket) -> float:
    """Sends until the peer has taken bytes for SECONDS and says how many; bytes per second."""
    end = time.monotonic() + PATIENCE
    wire.setblocking(False)
    while time.monotonic() < end:
        readable, writable, _ = select.select([wire], [wire], [], PATIENCE)
        if readable:
            wire.settimeout(PATIENCE)
            count, _, micros = _line(wire).partition(b" ")
            return int(count) / (int(micros) / 1e6)
        if writable:
            with contextlib.suppress(BlockingIOError):
                wire.send(BLOCK)
    raise TimeoutError("the meter did not answer")


def _receive(wire: socket.socket) -> tuple[int, float]:
    """Takes bytes for SECONDS from the first on: (bytes after the first ones, seconds)."""
    buffer = memoryview(bytearray(len(BLOCK)))
    if not wire.recv_into(buffer):
        raise ConnectionResetError("nothing came")
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < SECONDS:
        size = wire.recv_into(buffer)
        if not size:
            break
        count += size
    return count, max(spent, 1e-6)


def _line(wire: socket.socket) -> bytes:
    """Up to a line end, byte by byte: nothing after it may be taken."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 200:
        byte = wire.recv(1)
        if not byte:
            raise ConnectionResetError("the connection closed")
        line += byte
    return line.rstrip(b"\n")


def headers(address: str) -> int:
    """Bytes of IP and UDP before the payload of a packet to `address`."""
    return HEADERS[_family(address)]


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
