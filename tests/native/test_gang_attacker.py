"""A stranger at node 0's control port: nothing but a refusal in the log, and the job goes on."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.native.launchers import ALL_REDUCE, nodes

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
        listening = [
            (connection.laddr.ip, connection.laddr.port)
            for connection in psutil.Process(first.process.pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == [("127.0.0.1", int(job.settings["MASTER_PORT"]) + 1)]
        first.process.terminate()
        assert first.end() == 143
