"""Files from node to node: several plain TCP streams, whose answers carry a keyed checksum.

The receiver asks for a frame, which is many small files or a piece of a large one, and uses it once the checksum has
proven it. A connection is believed after both sides have proven the key that node 0 made for this exchange; nothing
listens before and after. Threads with blocking sockets, so that neither a disk nor a checksum keeps the heartbeat
waiting.
"""

import contextlib
import errno
import hashlib
import hmac
import itertools
import json
import os
import queue
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from app.gang.mirror.disk import Disk
from app.gang.mirror.manifest import Copy, Version, listed, number, read_version, row, safe_path, word
from app.gang.mirror.plan import Transfer

STREAMS = 4
STALL = 20.0
"""Seconds without a byte until a connection counts as broken."""
SLOWEST_DISK = 50e6
"""Bytes a second that a checksum of a whole file may take longer for."""
CONNECT = 5.0
PROOF = 5.0
"""Seconds from a connection to the proof of the key."""
STRANGERS = 64
"""Connections served at a time."""
FRAME, FRAME_FILES = 2 << 20, 256
"""The most of one answer: bytes that stay in a processor's cache meanwhile."""
FRAMES_A_SECOND = 10
"""Of a copy in the background: the link is left to the training between two."""
SETTLE = 1 << 30
"""Bytes that come until they are synced and get their names; a kill costs no more."""
MOST_REQUEST = 1 << 20
DATA, HOLE, SAME, OTHER, CHANGED, MISSING = range(6)
CUT_SHORT = errno.ECONNRESET


@dataclass(frozen=True, slots=True)
class Key:
    secret: bytes
    private: bool
    """Only who has the cluster token knows it. Without one, whoever can change what is on its way could make any
    checksum, so that a fast one does: SHA-256 at both ends takes more of the processors than all else."""

    def of(self, purpose: bytes, first: bytes, second: bytes) -> "Key":
        return Key(hmac.new(self.secret, purpose + first + second, "sha256").digest(), self.private)


class BrokenTransferError(Exception):
    """A peer's answer that cannot be used; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file, or the question whether all of it has a certain `digest`."""

    transfer: Transfer
    offset: int
    length: int


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a node is; read by whoever prints it."""

    total: int = 0
    files: int = 0
    done: int = 0
    waiting: int = 0
    """Files that have come, and have not got their names yet."""
    arrived: int = 0
    same: int = 0
    """Files that this node had with the same content."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why a path did not come."""
    started: float = field(default_factory=time.monotonic)


# The sending side.


class Server:
    """Answers whoever proves `key`, until it is closed."""

    def __init__(self, disk: Disk, address: str, key: Key, *, background: bool = False) -> None:
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
        with contextlib.suppress(OSError, ValueError, RecursionError), peer:
            peer.settimeout(PROOF)
            mine = secrets.token_bytes(16)
            peer.sendall(mine)
            theirs, proof = bytes(_receive(peer, 16)), _receive(peer, 32)
            if not hmac.compare_digest(proof, self._key.of(b"client", mine, theirs).secret):
                return
            peer.sendall(self._key.of(b"server", mine, theirs).secret)
            session, frame = self._key.of(b"session", mine, theirs), memoryview(bytearray(FRAME))
            for turn in itertools.count():
                # Between two requests the receiver may write and sync for as long as it likes.
                peer.settimeout(None)
                length = int.from_bytes(_receive(peer, 4), "big")
                peer.settimeout(STALL)
                if not 0 < length <= MOST_REQUEST:
                    return
                states, end = bytearray(), 0
                for asked in listed(json.loads(_receive(peer, length)), FRAME_FILES):
                    state, count = self._answer(asked, frame[end:])
                    states.append(state)
                    end += count
                peer.sendall(states, socket.MSG_MORE)
                peer.sendall(frame[:end], socket.MSG_MORE)
                peer.sendall(_checksum(session, turn, states, frame[:end]))
        self._open.discard(peer)

    def _answer(self, asked: object, frame: memoryview) -> tuple[int, int]:
        """How a piece is answered, and how many bytes of it are in `frame` now. Raises ValueError."""
        path, previous, size, mtime_ns, offset, length, digest = row(asked, 7)
        path, version, digest = safe_path(path), read_version(size, mtime_ns), word(digest)
        offset, length = number(offset, 0, version.size), number(length, 0, len(frame))
        try:
            fd = self._disk.open_to_read(path, previous=bool(previous))
        except OSError:
            return MISSING, 0
        try:
            if _version(fd) != version:
                return CHANGED, 0
            if digest:
                return (SAME if digest == digest_of(fd) else OTHER), 0
            if _is_hole(fd, offset, length):
                return HOLE, 0
            # What is written meanwhile is of no use, cut short or not.
            whole = os.preadv(fd, [frame[:length]], offset) == length and _version(fd) == version
            return (DATA, length) if whole else (CHANGED, 0)
        finally:
            os.close(fd)


# The receiving side.


@dataclass(slots=True)
class _Incoming:
    """A file that several streams may write."""

    transfer: Transfer
    fd: int
    name: str
    pieces: int


class Fetcher:
    """Fetches files for one node. `run` blocks until all came or failed; `stop` ends it early."""

    def __init__(
        self,
        disk: Disk,
        own: str,
        key: Key,
        sources: Mapping[int, tuple[str, int]],
        *,
        bytes_per_second: float = 0.0,
    ) -> None:
        """`own` is the address to connect from; `sources` are the nodes' servers by rank."""
        self._disk, self._own, self._key, self._sources = disk, own, key, sources
        self._pace = Pace(bytes_per_second) if bytes_per_second else None
        self._streams = 1 if self._pace else STREAMS
        self._frame = min(FRAME, int(bytes_per_second / FRAMES_A_SECOND)) if self._pace else FRAME
        self._lock = threading.Lock()
        self._open = _Sockets()
        self._work: queue.SimpleQueue[Sequence[Piece]] = queue.SimpleQueue()
        self._partial: dict[str, _Incoming] = {}
        self._whole: list[_Incoming] = []
        self._unsettled = 0
        self._stopped = ""
        self.progress = Progress()

    def stop(self, why: str) -> None:
        self._stopped = self._stopped or why
        self._open.close()

    def run(self, transfers: Sequence[Transfer], rank: int) -> Progress:
        """Raises OSError where the state file cannot be written, or what came not be synced."""
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
        for frame in frames(remote, self._frame):
            self._work.put(frame)
        streams = range(min(self._streams, self._work.qsize()))
        threads = [threading.Thread(target=self._stream, name="mirror", daemon=True) for _ in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._settle()
        self._disk.sync()
        self._disk.write_state()
        return self.progress

    def _make_here(self, one: Transfer) -> None:
        try:
            if one.entry.link:
                self._disk.make_link(one.entry)
            elif one.previous and one.entry.version.size:
                self._disk.put_back(one.entry)
            else:
                fd, name = self._disk.incoming(0)
                self._disk.complete(fd, one.entry)
                self._disk.place(name, one.entry.path)
        except OSError as error:
            self._fail(one, reason(error))
        else:
            self._arrived(one)

    def _arrived(self, one: Transfer, *, same: bool = False) -> None:
        entry = one.entry
        with self._lock:
            # What has the same content was not brought: it stays this node's own.
            self._disk.arrived(entry.path, Copy(entry.version, "" if same else entry.origin))
            if same:
                self.progress.same += 1
            else:
                self.progress.arrived += 1

    def _fail(self, one: Transfer, why: str) -> None:
        with self._lock:
            self.progress.failed.setdefault(one.entry.path, why)

    def _stream(self) -> None:
        if self._pace:
            step_back()
        peers: dict[int, _Peer] = {}
        while True:
            try:
                frame = self._work.get_nowait()
            except queue.Empty:
                break
            self._fetch(peers, frame)
        for peer in peers.values():
            peer.close()

    def _fetch(self, peers: dict[int, "_Peer"], frame: Sequence[Piece]) -> None:
        """One frame of one node; where the connection breaks it is asked for once more."""
        source, why = frame[0].transfer.source, ""
        for _ in range(2):
            if self._stopped:
                break
            try:
                peer = peers.get(source) or self._connect(peers, source)
                states, data = peer.ask(frame, [self._own_digest(piece) for piece in frame])
            except (OSError, BrokenTransferError) as error:
                why = reason(error)
                if broken := peers.pop(source, None):
                    broken.close()
                continue
            for piece, state in zip(frame, states, strict=True):
                count = piece.length if state == DATA else 0
                self._take(piece, state, data[:count])
                data = data[count:]
            return
        for piece in frame:
            self._piece_done(piece, self._stopped or why)

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

    def _own_digest(self, piece: Piece) -> str:
        """Of this node's file of the same size: its content may be the same."""
        if piece.length:
            return ""
        with contextlib.suppress(OSError):
            fd = self._disk.open_to_read(piece.transfer.entry.path, previous=False)
            try:
                return digest_of(fd)
            finally:
                os.close(fd)
        return "none"

    def _take(self, piece: Piece, state: int, data: memoryview) -> None:
        """Uses one answer."""
        one = piece.transfer
        try:
            if state in (DATA, HOLE) and piece.length:
                file = self._incoming(one)
                written = 0
                while written < len(data):
                    written += os.pwrite(file.fd, data[written:], piece.offset + written)
                self._piece_done(piece)
            elif state == SAME and not piece.length:
                self._disk.touch(one.entry)
                self._arrived(one, same=True)
            elif state == OTHER and not piece.length:
                for frame in frames([one], self._frame, compare=False):
                    self._work.put(frame)
            else:
                told = {CHANGED: "changed meanwhile", MISSING: "is no longer there"}
                self._piece_done(piece, told.get(state, "an answer of no known kind"))
        except OSError as error:
            self._piece_done(piece, reason(error))
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.stop(reason(error))
        with self._lock:
            self.progress.done += len(data)
        if self._pace:
            self._pace.wait(len(data))

    def _incoming(self, one: Transfer) -> _Incoming:
        size = one.entry.version.size
        with self._lock:
            file = self._partial.get(one.entry.path)
            if file is None:
                file = _Incoming(one, *self._disk.incoming(size), pieces=-(-size // self._frame))
                self._partial[one.entry.path] = file
            return file

    def _piece_done(self, piece: Piece, why: str = "") -> None:
        """A piece is on the disk, or will not come: then the others are of no use."""
        one = piece.transfer
        if why:
            self._fail(one, why)
        with self._lock:
            file = self._partial.get(one.entry.path)
            if file is None:
                return
            file.pieces -= 1
            if file.pieces:
                return
            del self._partial[one.entry.path]
            failed = one.entry.path in self.progress.failed
        try:
            self._disk.complete(file.fd, one.entry)
        except OSError as error:
            failed = True
            self._fail(one, reason(error))
        if failed:
            self._disk.drop(file.name)
            return
        with self._lock:
            self._whole.append(file)
            self.progress.waiting += 1
            self._unsettled += one.entry.stored
            full = self._unsettled > SETTLE
        if full:
            self._settle()

    def _settle(self) -> None:
        """Gives what came whole its names, once it is on the disk: after a loss of power a name must not lead to less
        than it did before. Small files are synced together: one by one, 10,000 of them take longer than all else."""
        with self._lock:
            files, self._whole, self._unsettled = self._whole, [], 0
        why = ""
        try:
            if files:
                self._disk.sync()
        except OSError as error:
            why = reason(error)
        for file in files:
            self.progress.waiting -= 1
            if why:
                self._disk.drop(file.name)
                self._fail(file.transfer, why)
                continue
            try:
                self._disk.place(file.name, file.transfer.entry.path)
            except OSError as error:
                self._fail(file.transfer, reason(error))
            else:
                self._arrived(file.transfer)

    def close(self) -> None:
        """Closes what failed transfers left open."""
        self.stop("ended")
        with self._lock:
            for file in self._partial.values():
                with contextlib.suppress(OSError):
                    os.close(file.fd)
            for file in (*self._partial.values(), *self._whole):
                self._disk.drop(file.name)
            self._partial.clear()


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

    def __init__(self, connection: socket.socket, key: Key, sockets: "_Sockets") -> None:
        self._socket, self._sockets = connection, sockets
        self._frame, self._turns = memoryview(bytearray(FRAME)), itertools.count()
        connection.settimeout(PROOF)
        theirs, mine = bytes(_receive(connection, 16)), secrets.token_bytes(16)
        connection.sendall(mine + key.of(b"client", theirs, mine).secret)
        if not hmac.compare_digest(_receive(connection, 32), key.of(b"server", theirs, mine).secret):
            raise BrokenTransferError("what answers there is not this job's node")
        self._session = key.of(b"session", theirs, mine)

    def ask(self, pieces: Sequence[Piece], digests: Sequence[str]) -> tuple[bytearray, memoryview]:
        """The state of each piece, and the bytes of those that have any."""
        asked = []
        for piece, digest in zip(pieces, digests, strict=True):
            entry = piece.transfer.entry
            version = [entry.version.size, entry.version.mtime_ns]
            asked.append([entry.path, piece.transfer.previous, *version, piece.offset, piece.length, digest])
        line = json.dumps(asked, separators=(",", ":")).encode()
        hashed = sum(piece.transfer.entry.version.size for piece in pieces if not piece.length)
        self._socket.settimeout(STALL + hashed / SLOWEST_DISK)
        self._socket.sendall(len(line).to_bytes(4, "big") + line)
        states = _receive(self._socket, len(pieces))
        data = self._frame[: sum(piece.length for piece, state in zip(pieces, states, strict=True) if state == DATA)]
        _receive_into(self._socket, data)
        if not hmac.compare_digest(
            _receive(self._socket, 32), _checksum(self._session, next(self._turns), states, data)
        ):
            raise BrokenTransferError("the checksum is wrong")
        return states, data

    def close(self) -> None:
        self._sockets.discard(self._socket)
        self._socket.close()


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


def frames(transfers: Sequence[Transfer], most: int, *, compare: bool = True) -> Iterator[Sequence[Piece]]:
    """What is asked for at a time, of one source each.

    Large files first: the last stream to end shall end with small ones."""
    small: dict[int, list[Piece]] = {}
    for one in transfers:
        size = one.entry.version.size
        if size > most and not (one.compare and compare):
            for offset in range(0, size, most):
                yield [Piece(one, offset, min(most, size - offset))]
        else:
            small.setdefault(one.source, []).append(Piece(one, 0, 0 if one.compare and compare else size))
    for pieces in small.values():
        frame, room = list[Piece](), most
        for piece in pieces:
            if frame and (room < piece.length or len(frame) == FRAME_FILES):
                yield frame
                frame, room = [], most
            frame.append(piece)
            room -= piece.length
        yield frame


def step_back() -> None:
    """The training comes first. Linux gives each thread a nice value of its own."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def digest_of(fd: int) -> str:
    digest, buffer, offset = hashlib.sha256(), memoryview(bytearray(1 << 20)), 0
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


def _checksum(key: Key, turn: int, states: bytearray, data: memoryview) -> bytes:
    """Of one answer; its number keeps answers in their order."""
    keyed = hmac.new(key.secret, turn.to_bytes(8, "big") + states, "sha256")
    keyed.update(data if key.private else zlib.crc32(data).to_bytes(4, "big"))
    return keyed.digest()


def _receive(peer: socket.socket, count: int) -> bytearray:
    """Exactly `count` bytes. Raises OSError."""
    found = bytearray(count)
    _receive_into(peer, memoryview(found))
    return found


def _receive_into(peer: socket.socket, room: memoryview) -> None:
    while room:
        count = peer.recv_into(room)
        if not count:
            raise OSError(CUT_SHORT, "connection closed")
        room = room[count:]


def exchange_key(token: bytes, nonce: bytes) -> Key:
    """The key of one exchange: who only listens on the wire sees the nonce, and does not have the token."""
    return Key(token, bool(token)).of(b"checkpoints ", nonce, b"")
