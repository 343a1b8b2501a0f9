"""Packets of full size over loopback: echoed to whoever knows the key, strangers ignored, nothing left running."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from app.doctor.collect import packets
from app.doctor.collect.packets import PacketEcho, Peer, full_size


@pytest.fixture
def echo() -> Iterator[PacketEcho]:
    made = PacketEcho("127.0.0.2")
    try:
        yield made
    finally:
        made.close()


def peer_of(echo: PacketEcho, key: str = "") -> Peer:
    return Peer(address="127.0.0.2", port=echo.port, key=key or echo.key)


def test_packets_of_full_size_pass_on_loopback(echo: PacketEcho) -> None:
    for mtu in (65536, 1500):
        assert full_size("127.0.0.1", peer_of(echo), mtu) == "passes"


def test_a_stranger_without_the_key_gets_no_byte(echo: PacketEcho, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packets, "WAIT", 0.02)
    assert full_size("127.0.0.1", peer_of(echo, key="f" * 32), 1500) == "unknown"


def test_full_size_packets_that_do_not_come_back_are_lost(echo: PacketEcho, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands for a switch with a small MTU: the sender's large packets are never sent.
    monkeypatch.setattr(packets, "WAIT", 0.02)
    honest = packets._answered
    monkeypatch.setattr(
        packets, "_answered", lambda probe, key, size: size == packets.SMALL and honest(probe, key, size)
    )
    assert full_size("127.0.0.1", peer_of(echo), 9000) == "lost"


def test_after_close_no_thread_is_left_and_the_port_is_free() -> None:
    before = threading.active_count()
    made = PacketEcho("127.0.0.2")
    made.close()
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.2", made.port))
