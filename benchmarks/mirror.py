"""Checkpoints from node to node against one plain TCP stream: `python -m benchmarks.mirror`.

Two addresses of this machine's loopback. The plain stream reads a file of the same size, sends it, and writes and syncs
it at the other end, so that both pay for the disk. For many files it is also `tar` at both ends of one connection:
making the files costs a kernel several times what moving the bytes does. Rounds alternate, and each gives one ratio,
since the speed of a shared machine drifts. Loopback is the hardest case: a real network leaves the processors more time
per byte. BENCH_DIR names another disk, TOKEN=1 is the checksum of jobs with a cluster token.
"""

import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from app.gang.mirror.disk import Disk
from app.gang.mirror.plan import Bounds, plan_transfers
from app.gang.mirror.transfer import Fetcher, Server, exchange_key

ROUNDS = 5
PIECE = 1 << 20
KEY = exchange_key(b"token" if os.environ.get("TOKEN") else b"", b"nonce")
CASES = (
    ("1 GB in one file", 1, 10**9),
    ("1 GB in 10,000 files", 10_000, 10**5),
    ("100,000 files of 1 KB", 100_000, 1000),
)


def main() -> int:
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        root = Path(folder)
        for name, count, size in CASES:
            make(root / "from/checkpoints", count, size)
            ratios: dict[str, list[float]] = {"one stream": [], "tar": []}
            for _ in range(1 if count > 10_000 else ROUNDS):
                whole = count * size
                plain, tarred, ours = plain_stream(root, whole), tar_stream(root), mirrored(root, count)
                told = [f"{speed / 1e6:,.0f}" for speed in (whole / ours, whole / plain, whole / tarred)]
                print(f"{name}: {told[0]} MB/s; one stream {told[1]}, tar {told[2]}", flush=True)
                ratios["one stream"].append(plain / ours)
                ratios["tar"].append(tarred / ours)
            for other, found in ratios.items():
                print(f"{name}: {statistics.median(found):.2f} of {other}", flush=True)
            shutil.rmtree(root / "from")
    return 0


def make(folder: Path, count: int, size: int) -> None:
    block = os.urandom(PIECE)
    for number in range(count):
        file = folder / f"step-1/{number % 100}/{number}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            for start in range(0, size, PIECE):
                opened.write(block[: min(PIECE, size - start)])


def plain_stream(root: Path, size: int) -> float:
    """Seconds of one stream from a file into a file, synced."""
    source, target = root / "plain", root / "plain-copy"
    if not source.exists() or source.stat().st_size != size:
        with source.open("wb") as opened:
            for start in range(0, size, PIECE):
                opened.write(os.urandom(min(PIECE, size - start)))
    listener = socket.create_server(("127.0.0.1", 0))

    def send() -> None:
        with socket.create_connection(listener.getsockname()) as peer, source.open("rb") as opened:
            peer.sendfile(opened)

    started = time.monotonic()
    sender = threading.Thread(target=send)
    sender.start()
    peer, _ = listener.accept()
    buffer = memoryview(bytearray(PIECE))
    with peer, target.open("wb") as opened:
        while count := peer.recv_into(buffer):
            opened.write(buffer[:count])
        opened.flush()
        os.fsync(opened.fileno())
    taken = time.monotonic() - started
    sender.join()
    listener.close()
    target.unlink()
    return taken


def tar_stream(root: Path) -> float:
    """Seconds of `tar` into one connection and out of it, synced."""
    (root / "to").mkdir()
    listener, started = socket.create_server(("127.0.0.1", 0)), time.monotonic()
    with socket.create_connection(listener.getsockname()) as sender, listener.accept()[0] as receiver, listener:
        unpacks = subprocess.Popen(["tar", "-C", str(root / "to"), "-xf", "-"], stdin=receiver.fileno())
        subprocess.run(["tar", "-C", str(root / "from"), "-cf", "-", "."], stdout=sender.fileno(), check=True)
        sender.shutdown(socket.SHUT_WR)
        unpacks.wait()
    disk = Disk(root / "to/checkpoints")
    disk.sync()
    taken = time.monotonic() - started
    disk.close()
    shutil.rmtree(root / "to")
    return taken


def mirrored(root: Path, count: int) -> float:
    """Seconds of the transfer itself: what is compared and planned before takes `planning` seconds more."""
    source, target = Disk(root / "from/checkpoints"), Disk(root / "to/checkpoints")
    started = time.monotonic()
    plan = plan_transfers({0: source.scan(), 1: target.scan()}, {}, Bounds(keep=None))
    planning = time.monotonic() - started
    here, there = socket.socketpair()
    # In a process of its own, as on a machine of its own.
    sender = multiprocessing.get_context("fork").Process(target=serve, args=(source, here, there), daemon=True)
    sender.start()
    there.close()
    fetcher = Fetcher(target, "127.0.0.2", KEY, {0: ("127.0.0.1", int(here.recv(16)))})
    started = time.monotonic()
    result = fetcher.run(plan.orders[1].fetch, 1)
    taken = time.monotonic() - started
    here.close()
    sender.join()
    if result.arrived != count:
        raise SystemExit(f"{result.arrived} of {count} files came: {[*result.failed.items()][:3]}")
    if count > 1:
        print(f"  listing and planning {count:,} files: {planning:.1f} s", flush=True)
    for disk in (source, target):
        disk.close()
    shutil.rmtree(root / "to")
    return taken


def serve(disk: Disk, other: socket.socket, control: socket.socket) -> None:
    """Answers until the other end of `control` is closed."""
    other.close()
    server = Server(disk, "127.0.0.1", KEY)
    control.sendall(str(server.port).encode())
    control.recv(1)
    server.close()


if __name__ == "__main__":
    sys.exit(main())
