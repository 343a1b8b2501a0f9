"""A stranger at node 0's control port: nothing but a refusal in the log, and the job goes on."""

import contextlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.native.launchers import ALL_REDUCE, Launcher, nodes

GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"[" * 70_000,
    b"a" * 200_000,
    b'{"kind":"open","v":1,"nonce":"n"}\n{"kind":"hello","proof":"","run":"default","rank":-1,"nnodes":2}\n',
    b'{"kind":"open","v":1,"nonce":"n"}\n{"kind":"hello","proof":"","run":"default","rank":1e999,"nnodes":2}\n',
    b'{"kind":"open","v":999,"nonce":"n"}\n',
    b'{"kind":"verdict","code":0,"text":"done"}\n',
    b"\n" * 1000,
]


@contextlib.contextmanager
def knocks(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing, from many addresses."""
    held = []
    try:
        for number in range(count):
            with contextlib.suppress(OSError):
                own = (f"127.1.{number // 200}.{number % 200 + 1}", 0)
                held.append(socket.create_connection(("127.0.0.1", port), timeout=5, source_address=own))
        yield held
    finally:
        for one in held:
            one.close()


@pytest.mark.parametrize("token", [True, False])
def test_garbage_silence_and_floods_do_not_stop_a_job_from_starting(tmp_path: Path, *, token: bool) -> None:
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef0123456789abcdef")
    with nodes(tmp_path, 2, ALL_REDUCE, CLUSTER_TOKEN_FILE=str(secret) if token else "") as job:
        first = job.start(0, "10")
        first.wait_for(r"waiting \d+ s for node 1")
        before = psutil.Process(first.process.pid).memory_info().rss
        port = int(job.settings["MASTER_PORT"]) + 1
        for garbage in [*GARBAGE, os.urandom(50_000)]:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as attacker:
                with contextlib.suppress(OSError):
                    attacker.sendall(garbage)
                with contextlib.suppress(OSError):
                    attacker.recv(1000)
        first.wait_for("rejected connection from 127.0.0.1: ")
        with knocks(port, 300):
            growth = psutil.Process(first.process.pid).memory_info().rss - before
            assert growth < 20_000_000
            # Its 68 places for strangers are all taken, and each is free again after five seconds.
            second = job.start(1, "10")
            assert [first.end(60), second.end(60)] == [0, 0]
    assert "Traceback" not in first.text


def listening(launcher: Launcher) -> list[tuple[str, int]]:
    """Where a launcher itself, and not its torchrun, listens."""
    found = psutil.Process(launcher.process.pid).net_connections("tcp")
    return [(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN]


OPEN = b'{"kind":"open","v":2,"nonce":"n"}\n'
HELLO = {"kind": "hello", "run": "default", "job": "training", "rank": 1, "host": "x", "instance_id": "x", "key": "k"}
HOSTILE = [
    *GARBAGE,
    b"",
    OPEN,
    OPEN + b'{"kind":"proof","proof":"' + b"0" * 64 + b'","here":"127.0.0.2:1","translated":true}\n',
    OPEN + json.dumps(HELLO).encode() + b'\n{"kind":"stop"}\n',
    OPEN + b'{"kind":"proof","proof":"","here":""}\n{"kind":"stop"}\n{"kind":"ended","code":0}\n' * 100,
]
"""What strangers say; "" is silence."""


def attack(port: int, count: int) -> int:
    """So many hostile connections, from 100 strangers' addresses and from node 1's, a hundred at a time.
    Returns how many were made."""
    made, held = 0, list[socket.socket]()
    for number in range(count):
        own = "127.0.0.2" if number % 10 == 0 else f"127.3.0.{number % 100 + 1}"
        with contextlib.suppress(OSError):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(own, 0)))
            made += 1
            held[-1].sendall(HOSTILE[number % len(HOSTILE)])
        if len(held) > 100:
            held.pop(0).close()
    for one in held:
        one.close()
    return made


@pytest.mark.parametrize("token", [True, False])
def test_a_thousand_hostile_connections_leave_a_running_job_its_memory_and_its_log(
    tmp_path: Path, *, token: bool
) -> None:
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef0123456789abcdef")
    with nodes(tmp_path, 2, ALL_REDUCE, CLUSTER_TOKEN_FILE=str(secret) if token else "") as job:
        first, second = job.start_all("400")
        first.wait_for("trains: rank 0")
        assert listening(first) == [("127.0.0.1", int(job.settings["MASTER_PORT"]) + 1)]
        assert listening(second) == []
        process = psutil.Process(first.process.pid)
        before, logged, began = process.memory_info().rss, len(first.text), time.monotonic()
        assert attack(int(job.settings["MASTER_PORT"]) + 1, 1000) == 1000
        seconds = time.monotonic() - began
        assert process.memory_info().rss - before < 20_000_000
        assert first.process.poll() is None, first.text
        # One line in two seconds, and one for each way in which node 1's own address was turned away.
        assert len(first.text) - logged < 200 * (seconds / 2 + 3), first.text[logged:]
        assert [first.end(60), second.end(60)] == [0, 0]
    for launcher in (first, second):
        assert "Traceback" not in launcher.text
        assert "restart" not in launcher.text
        assert launcher.said[-1].startswith("done: all workers")


def forged(source: tuple[str, int], target: tuple[str, int], seq: int, ack: int, data: bytes) -> bytes:
    """A TCP segment, for IPPROTO_TCP of a raw socket."""
    header = struct.pack("!HHIIBBHHH", source[1], target[1], seq, ack, 5 << 4, 0x18, 65535, 0, 0)
    pseudo = socket.inet_aton(source[0]) + socket.inet_aton(target[0]) + struct.pack("!BBH", 0, 6, 20 + len(data))
    whole = pseudo + header + data + bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(whole) // 2}H", whole))
    total = (total >> 16) + (total & 0xFFFF)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return header[:16] + struct.pack("!H", checksum) + header[18:] + data


def on_the_path(source: tuple[str, int], target: str) -> tuple[int, int, int]:
    """The port of `target`, and the next sequence and acknowledgement numbers of the connection from `source` to it, as
    whoever sees its packets knows them."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)) as tap:
        tap.settimeout(10)
        while True:
            packet = tap.recv(65535)
            ip = (packet[0] & 15) * 4
            ports = struct.unpack_from("!HH", packet, ip)
            ends = socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])
            if packet[9] != 6 or (ends, ports[0]) != ((source[0], target), source[1]):
                continue
            seq, ack, offset = struct.unpack_from("!IIB", packet, ip + 4)
            length = int.from_bytes(packet[2:4]) - ip - (offset >> 4) * 4
            # A heartbeat of this connection, and not the data of a test of reach.
            if length > 40:
                return ports[1], (seq + length) & 0xFFFFFFFF, ack


VERDICT = {"kind": "verdict", "code": 0, "text": "done: all workers finished", "cause": "", "fix": ""}
LINES = {
    "a verdict for node 1": ("127.0.0.1", "127.0.0.2", VERDICT),
    "a stop for node 0": ("127.0.0.2", "127.0.0.1", {"kind": "stop"}),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees and sends packets of others")
@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("token", [True, False])
def test_a_man_on_the_path_who_forges_a_line_costs_a_running_job_one_connection_and_ends_nothing(
    tmp_path: Path, line: str, *, token: bool
) -> None:
    source, target, message = LINES[line]
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef0123456789abcdef")
    with nodes(tmp_path, 2, ALL_REDUCE, CLUSTER_TOKEN_FILE=str(secret) if token else "") as job:
        launchers = job.start_all("100")
        first, second = launchers
        first.wait_for("trains: rank 0")
        control = int(job.settings["MASTER_PORT"]) + 1
        # Sequence numbers are those of the sender that is forged: node 0's has the fixed port.
        port = control if source == "127.0.0.1" else _port_of_node_1(second.process.pid, control)
        other, seq, ack = on_the_path((source, port), target)
        data = b"0" * 32 + json.dumps(message).encode() + b"\n"
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            raw.bind((source, 0))
            raw.sendto(forged((source, port), (target, other), seq, ack, data), (target, 0))
        victim = second if target == "127.0.0.2" else first
        victim.wait_for("a line that was changed or added on the way", 20)
        assert [launcher.end(60) for launcher in launchers] == [0, 0]
        # It goes on in another round.
        assert all(one.text.count("trains: rank") >= 2 for one in launchers), first.text + second.text
    # A worker's own stands behind its rank.
    assert not [one for one in launchers if re.search("^Traceback", one.text, re.MULTILINE)]


def _port_of_node_1(pid: int, control: int) -> int:
    (found,) = [
        each.laddr.port
        for each in psutil.Process(pid).net_connections("tcp")
        if each.raddr and each.raddr.port == control
    ]
    return int(found)


@contextlib.contextmanager
def relay(listen: str, target: str, port: int) -> Iterator[None]:
    """A man at the address `listen` who has no token, and hands every byte on, both ways."""
    with socket.create_server((listen, port)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    victim, _ = server.accept()
                    out = socket.create_connection((target, port), timeout=5, source_address=(listen, 0))
                    for pair in ((victim, out), (out, victim)):
                        threading.Thread(target=copy, args=pair, daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield


def copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(4096):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def test_a_proof_that_is_relayed_from_another_job_makes_nobody_a_member_and_stops_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef0123456789abcdef")
    with nodes(tmp_path, 2, ALL_REDUCE, CLUSTER_TOKEN_FILE=str(secret)) as job:
        first = job.start(0, "10")
        first.wait_for(r"waiting \d+ s for node 1")
        with relay("127.0.0.9", "127.0.0.1", int(job.settings["MASTER_PORT"]) + 1):
            victim = job.start(1, "10", NODES="127.0.0.9,127.0.0.2")
            assert victim.end() == 7
        assert "a NAT or proxy that NODES does not tell of" in victim.said[-1]
        second = job.start(1, "10")
        assert [first.end(60), second.end(60)] == [0, 0]
    assert "a NAT or proxy that NODES does not tell of" in first.text


def test_node_0_waits_with_one_open_port_at_the_fabric_address_alone(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE) as job:
        first = job.start(0, "10")
        first.wait_for(r"waiting \d+ s for node 1")
        assert listening(first) == [("127.0.0.1", int(job.settings["MASTER_PORT"]) + 1)]
        first.process.terminate()
        assert first.end() == 143
