"""The meter over loopback: figures of a real pair of sockets, strangers turned away, nothing left running."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from app.doctor.collect import meter
from app.doctor.collect.meter import Meter, Peer, full_size, measure


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    monkeypatch.setattr(meter, "SECONDS", 0.05)
    made = Meter("127.0.0.2")
    try:
        yield made
    finally:
        made.close()


def peer_of(ear: Meter, key: str = "") -> Peer:
    return Peer(address="127.0.0.2", tcp=ear.tcp, udp=ear.udp, key=key or ear.key)


def test_a_pair_is_measured_both_ways(ear: Meter) -> None:
    speed = measure("127.0.0.1", peer_of(ear))
    assert 0 < speed.rtt < 0.1
    assert speed.out > 1e6
    assert speed.back > 1e6


def test_a_stranger_without_the_key_gets_no_byte(ear: Meter) -> None:
    with socket.create_connection(("127.0.0.2", ear.tcp), timeout=5) as wire:
        wire.sendall(b"0123456789abcdef0123456789abcdef give\n")
        assert wire.recv(10) == b""
    with pytest.raises(ConnectionError):
        measure("127.0.0.1", peer_of(ear, key="wrong"))


def test_packets_of_full_size_pass_on_loopback(ear: Meter) -> None:
    mtu = 65536
    assert full_size("127.0.0.1", peer_of(ear), mtu) == "passes"
    assert full_size("127.0.0.1", peer_of(ear), 1500) == "passes"


def test_where_nobody_answers_udp_nothing_is_concluded(ear: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "UDP_WAIT", 0.02)
    assert full_size("127.0.0.1", peer_of(ear, key="f" * 32), 1500) == "unknown"


def test_full_size_packets_that_do_not_come_back_are_lost(ear: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands for a switch with a small MTU: the sender's large packets are never sent.
    monkeypatch.setattr(meter, "UDP_WAIT", 0.02)
    honest = meter._answered
    monkeypatch.setattr(meter, "_answered", lambda wire, key, size: size == meter.SMALL and honest(wire, key, size))
    assert full_size("127.0.0.1", peer_of(ear), 9000) == "lost"


def test_after_close_no_thread_is_left_and_nobody_listens() -> None:
    before = threading.active_count()
    made = Meter("127.0.0.2")
    made.close()
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", made.tcp), timeout=1)
