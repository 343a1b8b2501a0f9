"""One node's part in the exchange of checkpoints: it does what node 0 asks, one thing at a time, in threads."""

import asyncio
import contextlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from app.gang.mirror.disk import Disk
from app.gang.mirror.manifest import (
    Copy,
    Entry,
    Manifest,
    Version,
    fields,
    listed,
    number,
    pack_entry,
    pack_manifest,
    read_entry,
    read_version,
    row,
    safe_path,
    word,
)
from app.gang.mirror.plan import Orders, Transfer
from app.gang.mirror.sentences import duration, size
from app.gang.mirror.transfer import Fetcher, Key, Progress, Server, exchange_key, reason, step_back
from app.gang.mirror.whole import SUFFIXES

QUIET = 5 * 10**9
"""Nanoseconds since the last write until a file counts as written, while its writer may live."""
SAY_AFTER, SAY_EVERY = 2.0, 10.0
ANSWER, SCAN = 15.0, 300.0
"""Seconds that a file system has for what takes no work, and for a list of all files."""
MOST_FAILURES = 20
NONCE = re.compile(r"mirror-[0-9a-f]{16}")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this node is, for the exchange."""

    folder: Path
    """CHECKPOINT_DIR."""
    rank: int
    address: str
    token: bytes


class MirrorNode:
    def __init__(self, place: Place, say: Callable[[str], None]) -> None:
        self._place, self._say = place, say
        self._nonce = ""
        self._disk: Disk | None = None
        self._server: Server | None = None
        self._fetcher: Fetcher | None = None
        self._turn = asyncio.Lock()

    async def answer(self, op: str, told: Mapping[str, Any]) -> dict[str, object]:
        """Does one thing; a disk's failure is an answer with a `problem`. Raises ValueError for what makes no sense."""
        if op in ("mark", "close"):
            self.stop()
        async with self._turn:
            try:
                return await self._do(op, told)
            except TimeoutError:
                return {"problem": f"{self._place.folder} does not answer: is its file server up?"}
            except OSError as error:
                return {"problem": f"{self._place.folder}: {reason(error)}"}

    async def _do(self, op: str, told: Mapping[str, Any]) -> dict[str, object]:
        if op == "mark":
            return await in_thread(self._mark, ANSWER)
        if op == "close":
            disks = frozenset(word(disk) for disk in listed(told.get("disks", [])))
            await in_thread(lambda: self._close(disks), ANSWER)
            return {}
        if self._disk is None:
            raise ValueError(f"{op} before mark")
        disk = self._disk
        if op == "look":
            nonces = {
                number(rank): word(nonce) for rank, nonce in (row(item, 2) for item in listed(told.get("nonces")))
            }
            return {"sees": await in_thread(lambda: [r for r, one in nonces.items() if _is_seen(disk, one)], ANSWER)}
        if op == "scan":
            wanted, background = bool(told.get("listed")), bool(told.get("background"))
            return await in_thread(lambda: self._scan(disk, wanted=wanted, background=background), SCAN)
        if op == "serve":
            key, background = self._key(told), bool(told.get("background"))
            make = partial(Server, disk, self._place.address, key, background=background)
            self._server = await in_thread(make, ANSWER)
            return {"port": self._server.port}
        if op == "fetch":
            return await self._fetch(disk, told)
        raise ValueError(f"unknown request {op[:20]!r}")

    def stop(self) -> None:
        """Ends what is under way; what has come whole stays."""
        if self._fetcher:
            self._fetcher.stop("stopped")
        if self._server:
            self._server.close()
            self._server = None

    def _key(self, told: Mapping[str, Any]) -> Key:
        return exchange_key(self._place.token, word(told.get("key")).encode())

    def _mark(self) -> dict[str, object]:
        self._close()
        self._disk = Disk(self._place.folder)
        self._nonce = f"mirror-{secrets.token_hex(8)}"
        self._disk.mark(self._nonce)
        return {"nonce": self._nonce, "clock": time.time_ns()}

    def _close(self, disks: frozenset[str] = frozenset()) -> None:
        """`disks` are those that were compared before a round."""
        self.stop()
        if self._disk:
            if disks and disks != self._disk.state.peers:
                self._disk.state.peers = disks
                self._disk.write_state()
            self._disk.unmark(self._nonce)
            self._disk.close()
        self._disk = self._fetcher = None

    def _scan(self, disk: Disk, *, wanted: bool, background: bool) -> dict[str, object]:
        if background:
            step_back()
        disk.unmark(self._nonce)
        if not wanted:
            return {}
        manifest = disk.scan()
        disk.write_state()
        if not background:
            disk.forget_old(manifest)
        return pack_manifest(_settled(manifest, time.time_ns()) if background else manifest)

    async def _fetch(self, disk: Disk, told: Mapping[str, Any]) -> dict[str, object]:
        orders = read_orders(told.get("orders"))
        sources = {}
        for rank, address, port in (row(item, 3) for item in listed(told.get("sources"))):
            sources[number(rank)] = (word(address), number(port, 1, 65535))
        rate = number(told.get("rate"))
        fetcher = Fetcher(disk, self._place.address, self._key(told), sources, bytes_per_second=float(rate))
        self._fetcher = fetcher
        telling = None if rate else asyncio.ensure_future(self._tell(fetcher))
        started = time.monotonic()
        try:
            deleted = await in_thread(lambda: carry_out(disk, orders, fetcher, self._place.rank))
        finally:
            if telling:
                telling.cancel()
        found = fetcher.progress
        return {
            "arrived": found.arrived,
            "bytes": found.done,
            "seconds": round(time.monotonic() - started, 3),
            "deleted": deleted,
            "failed": [[path, why] for path, why in [*found.failed.items()][:MOST_FAILURES]],
            "failures": len(found.failed),
        }

    async def _tell(self, fetcher: Fetcher) -> None:
        await asyncio.sleep(SAY_AFTER)
        while True:
            self._say(progress_line(fetcher.progress, time.monotonic()))
            await asyncio.sleep(SAY_EVERY)


def carry_out(disk: Disk, orders: Orders, fetcher: Fetcher, rank: int) -> int:
    """Blocks until all is done; the number of copies deleted. Raises OSError where the state cannot be written."""
    if orders.aside:
        disk.set_aside(orders.aside)
    disk.adopt(orders.adopt)
    disk.forget(orders.forget)
    for path in orders.owed:
        disk.state.awaited.setdefault(path, Copy(Version(0, 0), ""))
    deleted = sum(disk.delete(path, version) for path, version in orders.delete)
    try:
        fetcher.run(orders.fetch, rank)
    finally:
        fetcher.close()
    return deleted


def progress_line(progress: Progress, now: float) -> str:
    rate = progress.done / max(0.001, now - progress.started)
    left = f", about {duration((progress.total - progress.done) / rate)} left" if progress.done else ""
    files = f"{progress.arrived + progress.same + progress.waiting} of {progress.files} files"
    return f"copying checkpoints: {size(progress.done)} of {size(progress.total)}, {files}, {size(rate)}/s{left}"


def pack_orders(orders: Orders) -> dict[str, object]:
    return {
        "delete": [[path, version.size, version.mtime_ns] for path, version in orders.delete],
        "adopt": [list(pair) for pair in orders.adopt],
        "aside": list(orders.aside),
        "forget": list(orders.forget),
        "owed": list(orders.owed),
        "fetch": [[pack_entry(one.entry), one.source, one.previous, one.compare] for one in orders.fetch],
    }


def read_orders(value: object) -> Orders:
    """Raises ValueError."""
    told = fields(value)
    return Orders(
        delete=tuple(
            (safe_path(path), read_version(size, mtime_ns))
            for path, size, mtime_ns in (row(item, 3) for item in listed(told.get("delete")))
        ),
        adopt=tuple(
            (safe_path(path), word(origin)) for path, origin in (row(item, 2) for item in listed(told.get("adopt")))
        ),
        aside=tuple(safe_path(path) for path in listed(told.get("aside"))),
        forget=tuple(safe_path(path) for path in listed(told.get("forget"))),
        owed=tuple(safe_path(path) for path in listed(told.get("owed"))),
        fetch=tuple(
            Transfer(entry=read_entry(entry), source=number(source), previous=bool(previous), compare=bool(compare))
            for entry, source, previous, compare in (row(item, 4) for item in listed(told.get("fetch")))
        ),
    )


def _is_seen(disk: Disk, nonce: str) -> bool:
    return bool(NONCE.fullmatch(nonce)) and disk.sees(nonce)


def _settled(manifest: Manifest, now: int) -> Manifest:
    """While a training runs, what was written a moment ago may not be whole yet, nor a folder have all its files."""

    def judged(entry: Entry) -> Entry:
        tells = "/" not in entry.path and entry.path.endswith(SUFFIXES)
        written = tells or entry.link or entry.origin or now - entry.version.mtime_ns > QUIET
        return entry if written else replace(entry, torn=True)

    return replace(manifest, entries={path: judged(entry) for path, entry in manifest.entries.items()})


async def in_thread(work: Callable[[], _T], seconds: float | None = None) -> _T:
    """Runs what may block in a thread that does not keep the process alive: a file system may never answer. Raises
    TimeoutError."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def finish(act: Callable[[], None]) -> None:
        # RuntimeError: the loop has ended meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if done.done() else act())

    def run() -> None:
        try:
            value = work()
        except BaseException as error:
            failure = error
            finish(lambda: done.set_exception(failure))
        else:
            finish(lambda: done.set_result(value))

    threading.Thread(target=run, name="mirror", daemon=True).start()
    async with asyncio.timeout(seconds):
        return await done
