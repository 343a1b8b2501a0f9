"""Files from node to node: several plain TCP streams, each byte under a keyed checksum.

The receiver asks, the sender answers in order. A connection is believed after both sides have proven the key that
node 0 made for this exchange; nothing listens before and after. Threads with blocking sockets, so that neither a disk
nor a checksum keeps the heartbeat waiting.
"""

import contextlib
import errno
import hashlib
import hmac
import io
import itertools
import json
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from app.gang.mirror.disk import Disk
from app.gang.mirror.manifest import Copy, Version, fields, number, read_version, safe_path, word
from app.gang.mirror.plan import Transfer

STREAMS = 4
STALL = 20.0
"""Seconds without a byte until a connection counts as broken."""
CONNECT = 5.0
PROOF = 5.0
"""Seconds from a connection to the proof of the key."""
STRANGERS = 64
"""Connections served at a time."""
PIECE = 1 << 20
BUFFER = 1 << 18
PART = 64 << 20
"""Bytes of a large file that one stream fetches at a time."""
BATCH_BYTES, BATCH_FILES = 16 << 20, 256
MOST_REQUEST = 1 << 20
ANSWER = struct.Struct(">BQ")
DATA, HOLE, SAME, CHANGED, MISSING = range(5)
CUT_SHORT = errno.ECONNRESET


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def readinto(self, buffer: memoryview, /) -> int: ...


class BrokenTransferError(Exception):
    """A peer's answer that cannot be used; the text is for the user."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a node is; read by whoever prints it."""

    total: int
    files: int
    done: int = 0
    arrived: int = 0
    started: float = field(default_factory=time.monotonic)


@dataclass(slots=True, kw_only=True)
class TransferResult:
    arrived: list[Transfer] = field(default_factory=list)
    same: int = 0
    """Of them, files that this node had with the same content."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why a path did not come."""


# The sending side.


class Server:
    """Answers whoever proves `key`, until it is closed."""

    def __init__(self, disk: Disk, address: str, key: bytes, *, background: bool = False) -> None:
        """Raises OSError."""
        self._disk, self._key, self._background = disk, key, background
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=STRANGERS)
        self.port = int(self._listener.getsockname()[1])
        self._open = _Sockets()
        threading.Thread(target=self._accept, name="mirror", daemon=True).start()

    def close(self) -> None:
        # Without the shutdown a thread that waits in accept() keeps the port open.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._open.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            if len(self._open) >= STRANGERS or not self._open.add(peer):
                peer.close()
                continue
            threading.Thread(target=self._serve, args=(peer,), name="mirror", daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        if self._background:
            step_back()
        # ValueError, RecursionError: a request that is none. The peer sees the connection close.
        with contextlib.suppress(OSError, ValueError, RecursionError), peer, peer.makefile("rb") as stream:
            peer.settimeout(PROOF)
            mine = secrets.token_bytes(16)
            peer.sendall(mine)
            theirs, proof = _receive(stream, 16), _receive(stream, 32)
            if not hmac.compare_digest(proof, _proof(self._key, b"client", mine, theirs)):
                return
            peer.sendall(_proof(self._key, b"server", mine, theirs))
            session, number_ = _proof(self._key, b"session", mine, theirs), itertools.count()
            peer.settimeout(STALL)
            # Between two requests the receiver may write and sync for a while.
            while length := int.from_bytes(_receive(stream, 4), "big"):
                if length > MOST_REQUEST:
                    return
                for request in json.loads(_receive(stream, length)):
                    self._answer(peer, _Seal(session, next(number_)), request)
        self._open.discard(peer)

    def _answer(self, peer: socket.socket, seal: "_Seal", request: object) -> None:
        told = fields(request)
        path, previous = safe_path(told.get("path")), bool(told.get("previous"))
        version, digest = read_version(told.get("size"), told.get("mtime_ns")), word(told.get("digest"))
        offset = number(told.get("offset"), 0, version.size)
        length = number(told.get("length"), 0, version.size - offset)
        try:
            fd = self._disk.open_to_read(path, previous=previous)
        except OSError:
            seal.send(peer, ANSWER.pack(MISSING, 0))
            return
        try:
            if _version(fd) != version:
                seal.send(peer, ANSWER.pack(CHANGED, 0))
            elif digest and digest == digest_of(fd):
                seal.send(peer, ANSWER.pack(SAME, 0))
            elif _is_hole(fd, offset, length):
                seal.send(peer, ANSWER.pack(HOLE, length))
            elif length <= PIECE:
                data = os.pread(fd, length, offset)
                if len(data) != length:
                    raise OSError(CUT_SHORT, "cut short")
                seal.send(peer, ANSWER.pack(DATA, length) + data + bytes([_version(fd) != version]))
            else:
                self._send(peer, seal, fd, offset, length)
                seal.send(peer, bytes([_version(fd) != version]))
        finally:
            os.close(fd)

    def _send(self, peer: socket.socket, seal: "_Seal", fd: int, offset: int, length: int) -> None:
        head = ANSWER.pack(DATA, length)
        seal.mac.update(head)
        peer.sendall(head, socket.MSG_MORE)
        buffer = memoryview(bytearray(min(PIECE, length)))
        while length:
            count = os.preadv(fd, [buffer[: min(len(buffer), length)]], offset)
            if not count:
                # Cut short while it was read: the length is promised, so only the connection can tell.
                raise OSError(CUT_SHORT, "cut short")
            seal.mac.update(buffer[:count])
            peer.sendall(buffer[:count], socket.MSG_MORE)
            offset, length = offset + count, length - count


# The receiving side.


@dataclass(slots=True)
class _Incoming:
    """A file that several streams may write."""

    transfer: Transfer
    fd: int
    name: str
    parts: int
    failed: str = ""


class Fetcher:
    """Fetches files for one node. `run` blocks until all came or failed; `stop` ends it early."""

    def __init__(
        self,
        disk: Disk,
        own: str,
        key: bytes,
        sources: Mapping[int, tuple[str, int]],
        *,
        bytes_per_second: float = 0.0,
    ) -> None:
        """`own` is the address to connect from; `sources` are the nodes' servers by rank."""
        self._disk, self._own, self._key, self._sources = disk, own, key, sources
        self._pace = Pace(bytes_per_second) if bytes_per_second else None
        self._streams = 1 if bytes_per_second else STREAMS
        self._lock = threading.Lock()
        self._open = _Sockets()
        self._work: queue.SimpleQueue[tuple[int, Sequence[Transfer], Sequence[tuple[int, int]]]] = queue.SimpleQueue()
        self._partial: dict[str, _Incoming] = {}
        self._stopped = ""
        self.result = TransferResult()
        self.progress = Progress(total=0, files=0)

    def stop(self, why: str) -> None:
        self._stopped = self._stopped or why
        self._open.close()

    def run(self, transfers: Sequence[Transfer], rank: int) -> TransferResult:
        """Raises OSError where the state file cannot be written: nothing was fetched then."""
        self.progress = Progress(total=sum(one.entry.stored for one in transfers), files=len(transfers))
        self._disk.begin()
        # Before the first byte: after a kill a copy must be known as one, and what is missing as not yet come.
        self._disk.expect(
            {one.entry.path: Copy(one.entry.version, "" if one.compare else one.entry.origin) for one in transfers}
        )
        remote = list[Transfer]()
        for one in transfers:
            if one.entry.link or one.source == rank or not one.entry.version.size:
                self._make_here(one)
            else:
                remote.append(one)
        for item in batches(remote):
            self._work.put(item)
        threads = [
            threading.Thread(target=self._stream, name="mirror", daemon=True)
            for _ in range(self._streams if remote else 0)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._disk.sync()
        self._disk.write_state()
        return self.result

    def _make_here(self, one: Transfer) -> None:
        try:
            if one.entry.link:
                self._disk.make_link(one.entry)
            elif one.previous and one.entry.version.size:
                self._disk.put_back(one.entry)
            else:
                self._disk.finish(*self._disk.incoming(0), one.entry)
        except OSError as error:
            self._fail(one, reason(error))
        else:
            self._arrived(one)

    def _arrived(self, one: Transfer, *, same: bool = False) -> None:
        entry = one.entry
        with self._lock:
            # What has the same content was not brought: it stays this node's own.
            self._disk.arrived(entry.path, Copy(entry.version, "" if same else entry.origin))
            self.result.arrived.append(one)
            self.result.same += same
            self.progress.arrived += 1

    def _fail(self, one: Transfer, why: str) -> None:
        with self._lock:
            self.result.failed.setdefault(one.entry.path, why)

    def _stream(self) -> None:
        if self._pace:
            step_back()
        peers: dict[int, _Peer] = {}
        while True:
            try:
                source, transfers, ranges = self._work.get_nowait()
            except queue.Empty:
                break
            self._fetch(peers, source, list(zip(transfers, ranges, strict=True)))
        for peer in peers.values():
            peer.close()

    def _fetch(self, peers: dict[int, "_Peer"], source: int, wanted: list[tuple[Transfer, tuple[int, int]]]) -> None:
        """One batch from one node; what is left of it after a connection broke is asked for once more."""
        failures, left = 0, len(wanted)
        while wanted:
            try:
                self._exchange(peers.get(source) or self._connect(peers, source), wanted)
            except (OSError, BrokenTransferError) as error:
                if failed := peers.pop(source, None):
                    failed.close()
                failures, left = (failures + 1 if len(wanted) == left else 1), len(wanted)
                if self._stopped or failures > 1:
                    for one, _ in wanted:
                        self._part_failed(one, self._stopped or reason(error))
                    return

    def _connect(self, peers: dict[int, "_Peer"], source: int) -> "_Peer":
        address, port = self._sources[source]
        connection = socket.create_connection((address, port), CONNECT, (self._own, 0))
        try:
            if not self._open.add(connection):
                raise OSError(CUT_SHORT, self._stopped)
            peers[source] = peer = _Peer(connection, self._key, self._open)
        except BaseException:
            self._open.discard(connection)
            connection.close()
            raise
        return peer

    def _exchange(self, peer: "_Peer", wanted: list[tuple[Transfer, tuple[int, int]]]) -> None:
        """Takes from `wanted` what has been answered."""
        peer.ask(
            [
                {
                    "path": one.entry.path,
                    "previous": one.previous,
                    "size": one.entry.version.size,
                    "mtime_ns": one.entry.version.mtime_ns,
                    "offset": offset,
                    "length": length,
                    "digest": self._own_digest(one),
                }
                for one, (offset, length) in wanted
            ]
        )
        while wanted:
            one, (offset, length) = wanted[0]
            try:
                why = self._receive(peer, one, offset, length)
            except LocalError as error:
                # The rest of the answer is still on its way, so this connection is of no more use.
                wanted.pop(0)
                self._part_failed(one, reason(error.cause))
                if error.cause.errno in (errno.ENOSPC, errno.EDQUOT):
                    self.stop(reason(error.cause))
                raise BrokenTransferError(reason(error.cause)) from error
            wanted.pop(0)
            if why:
                self._part_failed(one, why)

    def _own_digest(self, one: Transfer) -> str:
        """Of this node's file of the same size, if it has one: its content may be the same."""
        if not one.compare:
            return ""
        try:
            fd = self._disk.open_to_read(one.entry.path, previous=False)
        except OSError:
            return ""
        try:
            return digest_of(fd) if os.fstat(fd).st_size == one.entry.version.size else ""
        except OSError:
            return ""
        finally:
            os.close(fd)

    def _receive(self, peer: "_Peer", one: Transfer, offset: int, length: int) -> str:
        """One answer; why it is of no use, or "". Raises OSError and BrokenTransferError for a bad connection,
        LocalError for this node's disk."""
        seal = peer.seal()
        kind, told = ANSWER.unpack(seal.receive(peer.stream, ANSWER.size))
        if kind == DATA and told == length:
            file = self._incoming(one)
            self._store(peer, seal, file, offset, length)
            changed = seal.receive(peer.stream, 1) != b"\0"
            seal.check(peer.stream)
            return "changed while it was copied" if changed else self._part_done(file)
        seal.check(peer.stream)
        if kind == HOLE and told == length:
            return self._part_done(self._incoming(one))
        if kind == SAME and one.compare:
            return self._is_same(one)
        return {CHANGED: "changed meanwhile", MISSING: "is no longer there"}.get(kind, "an answer of no known kind")

    def _incoming(self, one: Transfer) -> _Incoming:
        with self._lock:
            known = self._partial.get(one.entry.path)
            if known is None:
                try:
                    size = one.entry.version.size
                    known = _Incoming(one, *self._disk.incoming(size), parts=1 if one.compare else -(-size // PART))
                except OSError as error:
                    raise LocalError(error) from error
                self._partial[one.entry.path] = known
            return known

    def _store(self, peer: "_Peer", seal: "_Seal", file: _Incoming, offset: int, length: int) -> None:
        buffer = peer.buffer
        while length:
            count = peer.stream.readinto(buffer[: min(len(buffer), length)])
            if not count:
                raise OSError(CUT_SHORT, "connection closed")
            seal.mac.update(buffer[:count])
            try:
                written = 0
                while written < count:
                    written += os.pwrite(file.fd, buffer[written:count], offset + written)
            except OSError as error:
                raise LocalError(error) from error
            offset, length = offset + count, length - count
            with self._lock:
                self.progress.done += count
            if self._pace:
                self._pace.wait(count)

    def _part_done(self, file: _Incoming) -> str:
        with self._lock:
            file.parts -= 1
            if file.parts or file.failed:
                return ""
            del self._partial[file.transfer.entry.path]
        try:
            self._disk.finish(file.fd, file.name, file.transfer.entry)
        except OSError as error:
            return reason(error)
        self._arrived(file.transfer)
        return ""

    def _part_failed(self, one: Transfer, why: str) -> None:
        """Other parts of the file may still come; they are of no use."""
        self._fail(one, why)
        with self._lock:
            file = self._partial.get(one.entry.path)
            if file and not file.failed:
                file.failed = why
                self._disk.drop(file.name)
            if file and file.parts == 1:
                # No other stream has it.
                del self._partial[one.entry.path]
                os.close(file.fd)

    def _is_same(self, one: Transfer) -> str:
        try:
            self._disk.touch(one.entry)
        except OSError as error:
            return reason(error)
        self._arrived(one, same=True)
        return ""

    def close(self) -> None:
        """Closes what failed transfers left open."""
        self.stop("ended")
        with self._lock:
            for file in self._partial.values():
                with contextlib.suppress(OSError):
                    os.close(file.fd)
                self._disk.drop(file.name)
            self._partial.clear()


class LocalError(Exception):
    """This node's own disk."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Pace:
    """Lets no more than `rate` bytes a second pass, on average over a moment."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = time.monotonic()

    def wait(self, count: int) -> None:
        now = time.monotonic()
        self._free = max(self._free, now - 0.1) + count / self._rate
        time.sleep(max(0.0, self._free - now))


class _Peer:
    """A proven connection, seen by the receiver."""

    def __init__(self, connection: socket.socket, key: bytes, sockets: "_Sockets") -> None:
        self.socket, self._sockets = connection, sockets
        self.buffer = memoryview(bytearray(PIECE))
        self.stream = io.BufferedReader(connection.makefile("rb", 0), BUFFER)
        connection.settimeout(PROOF)
        theirs, mine = _receive(self.stream, 16), secrets.token_bytes(16)
        connection.sendall(mine + _proof(key, b"client", theirs, mine))
        if not hmac.compare_digest(_receive(self.stream, 32), _proof(key, b"server", theirs, mine)):
            raise BrokenTransferError("what answers there is not this job's node")
        connection.settimeout(STALL)
        self._session, self._number = _proof(key, b"session", theirs, mine), itertools.count()

    def ask(self, requests: Sequence[Mapping[str, object]]) -> None:
        line = json.dumps(requests, separators=(",", ":")).encode()
        self.socket.sendall(len(line).to_bytes(4, "big") + line)

    def seal(self) -> "_Seal":
        return _Seal(self._session, next(self._number))

    def close(self) -> None:
        self._sockets.discard(self.socket)
        self.stream.close()
        self.socket.close()


class _Seal:
    """The keyed checksum of one answer; its number keeps answers in their order."""

    def __init__(self, session: bytes, number_: int) -> None:
        self.mac = hmac.new(session, number_.to_bytes(8, "big"), "sha256")

    def send(self, peer: socket.socket, last: bytes) -> None:
        self.mac.update(last)
        peer.sendall(last + self.mac.digest())

    def receive(self, stream: Readable, count: int) -> bytes:
        got = _receive(stream, count)
        self.mac.update(got)
        return got

    def check(self, stream: Readable) -> None:
        if not hmac.compare_digest(_receive(stream, 32), self.mac.digest()):
            raise BrokenTransferError("the checksum is wrong")


class _Sockets:
    """Open connections, to be closed from another thread."""

    def __init__(self) -> None:
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    def add(self, one: socket.socket) -> bool:
        with self._lock:
            if not self._closed:
                self._open.add(one)
            return not self._closed

    def discard(self, one: socket.socket) -> None:
        with self._lock:
            self._open.discard(one)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for one in self._open:
                # A thread that waits in recv() wakes up; it closes the socket itself.
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)


def batches(
    transfers: Sequence[Transfer],
) -> Iterator[tuple[int, Sequence[Transfer], Sequence[tuple[int, int]]]]:
    """Portions of work for a stream: many small files of one source, or one part of a large file.

    Large files first: the last stream to end shall end with small ones."""
    small: dict[int, list[Transfer]] = {}
    for one in transfers:
        size = one.entry.version.size
        if size <= PART or one.compare:
            small.setdefault(one.source, []).append(one)
            continue
        for offset in range(0, size, PART):
            yield one.source, [one], [(offset, min(PART, size - offset))]
    for source, files in small.items():
        batch, room = list[Transfer](), BATCH_BYTES
        for one in files:
            if batch and (room < one.entry.version.size or len(batch) == BATCH_FILES):
                yield source, batch, [(0, each.entry.version.size) for each in batch]
                batch, room = [], BATCH_BYTES
            batch.append(one)
            room -= one.entry.version.size
        yield source, batch, [(0, each.entry.version.size) for each in batch]


def step_back() -> None:
    """The training comes first. Linux gives each thread a nice value of its own."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def digest_of(fd: int) -> str:
    digest, buffer, offset = hashlib.sha256(), memoryview(bytearray(PIECE)), 0
    while count := os.preadv(fd, [buffer], offset):
        digest.update(buffer[:count])
        offset += count
    return digest.hexdigest()


def reason(error: BaseException) -> str:
    """A failure in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer for {STALL:.0f} s"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error)


def _version(fd: int) -> Version:
    status = os.fstat(fd)
    return Version(status.st_size, status.st_mtime_ns)


def _is_hole(fd: int, offset: int, length: int) -> bool:
    """Whether a sparse file has nothing there. File systems that cannot tell say that all is data."""
    if not length or os.fstat(fd).st_blocks * 512 >= os.fstat(fd).st_size:
        return False
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        return error.errno == errno.ENXIO


def _proof(key: bytes, side: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.new(key, side + first + second, "sha256").digest()


def _receive(stream: Readable, count: int) -> bytes:
    """Exactly `count` bytes. Raises OSError."""
    found = stream.read(count)
    if len(found) < count:
        raise OSError(CUT_SHORT, "connection closed")
    return found


def exchange_key(token: bytes, nonce: bytes) -> bytes:
    """The key of one exchange: who only listens on the wire sees the nonce, and does not have the token."""
    return hmac.new(token, b"checkpoints " + nonce, "sha256").digest()
