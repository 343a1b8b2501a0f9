"""Whether packets of full size pass from one node to another: UDP that must not be fragmented, and its echo."""

import contextlib
import secrets
import socket
import threading
from dataclasses import dataclass

SMALL = 64
TRIES = 4
WAIT = 0.25
"""Seconds for each answer."""
HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}
"""Bytes of IP and UDP before the payload."""
LARGEST = 65507
# Linux's numbers (linux/in.h, linux/in6.h); Python names them only since 3.13. PROBE: never fragment, trust no cache.
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_PROBE = 10, 23, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Where a node echoes packets."""

    address: str
    port: int
    key: str


class PacketEcho:
    """Answers whoever knows `key` with the size of the packet that came, and nobody else; `close` ends it."""

    def __init__(self, address: str) -> None:
        self.key = secrets.token_hex(16)
        self._socket = socket.socket(_family(address), socket.SOCK_DGRAM)
        self._socket.bind((address, 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._answer, daemon=True).start()

    def close(self) -> None:
        # A thread that waits in recvfrom is woken by shutdown, not by close.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = self._socket.recvfrom(1 << 16)
                if not sender:
                    return
                if secrets.compare_digest(data[: len(self.key)], self.key.encode()):
                    self._socket.sendto(f"{self.key} {len(data)}".encode(), sender)


def full_size(own: str, peer: Peer, mtu: int) -> str:
    """Whether packets of `mtu` bytes reach the peer: `passes`, `lost`, or `unknown` where not even small ones do."""
    family = _family(own)
    size = min(mtu - headers(own), LARGEST)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((own, 0))
        if family == socket.AF_INET:
            probe.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
        else:
            probe.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
        probe.connect((peer.address, peer.port))
        probe.settimeout(WAIT)
        if not _answered(probe, peer.key, SMALL):
            return "unknown"
        return "passes" if _answered(probe, peer.key, size) else "lost"


def _answered(probe: socket.socket, key: str, size: int) -> bool:
    packet = key.encode().ljust(size, b".")
    expected = f"{key} {size}".encode()
    for _ in range(TRIES):
        # A closed port (ICMP) and a packet larger than the interface's own MTU are errors of `send` or `recv`.
        with contextlib.suppress(OSError):
            probe.send(packet)
            if probe.recv(200) == expected:
                return True
    return False


def headers(address: str) -> int:
    """Bytes of IP and UDP before the payload of a packet to `address`."""
    return HEADERS[_family(address)]


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
