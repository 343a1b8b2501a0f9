"""`logs`: what all ranks of all nodes say, as one stream in the order of time; what several say alike is one line."""

import asyncio
import contextlib
import re
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from app.config.errors import UserError, printable
from app.config.options import Parser
from app.fleet.hosts import Desk, Host
from app.fleet.remote import CONNECT, clock_ahead, complaints, everywhere, stream
from app.fleet.stack import compose

HOLD = 0.6
"""Seconds that a line waits for earlier ones of a host that is silent."""
FOLD = 0.25
"""Seconds between the first and the last of lines that are shown as one."""
MOST_HELD = 20_000
"""Lines of one host that wait for those of others."""
MOST_FOLDED = 4_000
LAUNCHER = "torchrun-compose: "
RANK = re.compile(r"\[rank (\d+)\] ?")
# Compose may clear the line before, whatever it is told.
STAMP = re.compile(r"(?:\x1b\[2K)*(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?Z ?")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a container."""

    time: float
    """Seconds since 1970 by this machine's clock."""
    host: Host
    rank: int | None
    """None for the launcher's own words."""
    text: str


class Reader:
    """Bytes of one container's log into lines. `offset` is how far the host's clock is ahead of ours."""

    def __init__(self, host: Host, offset: float = 0.0) -> None:
        self.host, self._offset = host, offset
        self._rest, self._last = b"", 0.0
        self._second, self._base = "", 0.0

    def feed(self, data: bytes) -> Iterator[Line]:
        """The lines that are complete with `data`."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        for raw in whole:
            yield self._line(raw.decode("utf-8", "replace").rstrip("\r"))

    def end(self) -> Iterator[Line]:
        """The last line, if its end was cut off."""
        return self.feed(b"\n") if self._rest else iter(())

    def _line(self, text: str) -> Line:
        if found := STAMP.match(text):
            text = text[found.end() :]
            if found[1] != self._second:
                self._second = found[1]
                self._base = datetime.fromisoformat(found[1]).replace(tzinfo=UTC).timestamp() - self._offset
            # Docker writes a log in the order of its lines, whatever the host's clock did meanwhile.
            self._last = max(self._last, self._base + float(found[2] or 0))
        elif not self._base:
            # A command's own output, which has no times: as it arrives.
            self._last = time.time()
        rank = RANK.match(text)
        text = text[rank.end() :] if rank else text.removeprefix(LAUNCHER)
        if not text.isprintable():
            text = printable(text.expandtabs())
        return Line(self._last, self.host, int(rank[1]) if rank else None, text)


@dataclass(slots=True)
class _Source:
    lines: deque[Line] = field(default_factory=deque)
    arrived: float = 0.0
    ended: bool = False


async def merged(streams: Mapping[Reader, AsyncGenerator[bytes]], hold: float) -> AsyncGenerator[list[Line]]:
    """Lines of all streams in the order of time, as many as there are; none when nothing came for FOLD seconds. A
    stream that is silent holds the others up for `hold` seconds."""
    sources = [_Source() for _ in streams]
    news, room = asyncio.Event(), asyncio.Event()

    async def read(reader: Reader, chunks: AsyncGenerator[bytes], source: _Source) -> None:
        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    source.lines.extend(reader.feed(chunk))
                    source.arrived = time.monotonic()
                    news.set()
                    while len(source.lines) > MOST_HELD:
                        room.clear()
                        await room.wait()
        finally:
            source.lines.extend(reader.end())
            source.ended = True
            news.set()

    pairs = zip(streams.items(), sources, strict=True)
    tasks = [asyncio.ensure_future(read(reader, chunks, source)) for (reader, chunks), source in pairs]
    try:
        while True:
            news.clear()
            if ready := list(_ready(sources, hold)):
                yield ready
            room.set()
            if all(source.ended and not source.lines for source in sources):
                break
            try:
                # Not wait_for, which up to Python 3.11 may swallow a Ctrl-C.
                async with asyncio.timeout(FOLD):
                    await news.wait()
            except TimeoutError:
                yield []
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _ready(sources: Sequence[_Source], hold: float) -> Iterator[Line]:
    """Lines that none still to come can precede, or that have waited long enough."""
    while True:
        full = [source for source in sources if source.lines]
        if not full:
            return
        first = min(full, key=lambda source: source.lines[0].time)
        waiting = any(not source.lines and not source.ended for source in sources)
        if waiting and time.monotonic() - first.arrived < hold and len(first.lines) <= MOST_HELD:
            return
        yield first.lines.popleft()


@dataclass(slots=True)
class _Group:
    number: int
    time: float
    text: str
    who: list[tuple[Host, int | None]]


class Folder:
    """Folds what several ranks or nodes say alike into one line, without changing the order of anybody's lines."""

    def __init__(self, hosts: int) -> None:
        self._hosts, self._next = hosts, 0
        self._open: deque[_Group] = deque()
        self._by_text: dict[tuple[str, bool], deque[_Group]] = {}
        self._last: dict[tuple[int, int | None], int] = {}

    def add(self, line: Line) -> Iterator[str]:
        """The lines that are finished now that `line` has come."""
        yield from self.flush(line.time - FOLD)
        source, alike = (line.host.rank, line.rank), self._by_text.setdefault((line.text, line.rank is None), deque())
        # The first of these lines that stands below all that this rank has said.
        group = next((each for each in alike if each.number > self._last.get(source, -1)), None)
        if group is None:
            group = _Group(self._next, line.time, line.text, [])
            self._next += 1
            self._open.append(group)
            alike.append(group)
        group.who.append((line.host, line.rank))
        self._last[source] = group.number

    def flush(self, before: float = float("inf")) -> Iterator[str]:
        """The lines whose first was said before that time."""
        while self._open and (self._open[0].time < before or len(self._open) > MOST_FOLDED):
            group = self._open.popleft()
            key = (group.text, group.who[0][1] is None)
            self._by_text[key].popleft()
            if not self._by_text[key]:
                del self._by_text[key]
            yield f"[{self._label(group.who)}] {group.text}"

    def _label(self, who: Sequence[tuple[Host, int | None]]) -> str:
        host, rank = who[0]
        if len(who) == 1:
            return host.name if rank is None else f"{host.name} rank {rank}"
        if rank is None:
            return f"all {len(who)} nodes" if len(who) == self._hosts else ", ".join(each.name for each, _ in who)
        ranks: dict[str, list[int]] = {}
        for each, number in who:
            ranks.setdefault(each.name, []).append(number or 0)
        return f"{len(who)} ranks: " + ", ".join(f"{name} {_spans(numbers)}" for name, numbers in ranks.items())


def _spans(numbers: Iterable[int]) -> str:
    """`0-3,8` of 0, 1, 2, 3 and 8."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def logs(desk: Desk, arguments: Sequence[str]) -> int:
    """Prints the stream; 1 where a host could not be read."""
    parser = Parser(prog="logs", description="What all ranks of all nodes say, in the order of time.")
    parser.add_argument("--rank", type=_ranks, metavar="N,...", help="only these ranks")
    parser.add_argument("--node", metavar="HOST,...", help="only these hosts, by name or rank")
    parser.add_argument("--since", metavar="TIME", help="from then on: 10m, 2h, or 2026-01-31T12:00:00Z")
    parser.add_argument("--follow", "-f", action="store_true", help="and what comes, until Ctrl-C")
    wanted = parser.read(arguments)
    if wanted.node:
        desk = desk.only(wanted.node.split(","))
    try:
        return asyncio.run(show(desk, follow=wanted.follow, since=wanted.since, ranks=wanted.rank))
    except KeyboardInterrupt:
        return 0


def _ranks(text: str) -> frozenset[int]:
    return frozenset(map(int, text.split(",")))


async def show(
    desk: Desk,
    *,
    follow: bool,
    since: str | float | None = None,
    ranks: frozenset[int] | None = None,
    until: Callable[[Line], bool] = lambda line: False,
) -> int:
    """Prints the merged stream of the hosts that answer, up to the line for which `until` is true."""
    clocks = await offsets(desk)
    streams = {
        Reader(host, offset): container_log(desk, host, follow, since + offset if isinstance(since, float) else since)
        for host, offset in clocks.items()
    }
    await print_merged(streams, ranks=ranks, until=until, hold=HOLD if follow else float("inf"))
    return int(len(clocks) < len(desk.hosts))


async def print_merged(
    streams: Mapping[Reader, AsyncGenerator[bytes]],
    *,
    ranks: frozenset[int] | None = None,
    until: Callable[[Line], bool] = lambda line: False,
    hold: float = HOLD,
) -> None:
    """Prints the streams as one."""
    folder = Folder(len(streams))
    try:
        async with contextlib.aclosing(merged(streams, hold)) as batches:
            async for batch in batches:
                for line in batch:
                    if ranks is None or line.rank in ranks:
                        write(folder.add(line))
                    if until(line):
                        return
                if not batch and hold == HOLD:
                    write(folder.flush())
                sys.stdout.flush()
    finally:
        write(folder.flush())
        sys.stdout.flush()


def write(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")


def container_log(desk: Desk, host: Host, follow: bool, since: str | float | None) -> AsyncGenerator[bytes]:
    """All that the trainer's container of a host says, each line with its time."""
    words = ["logs", "--no-color", "--no-log-prefix", "--timestamps"]
    words += ["--follow"] if follow else []
    words += [f"--since={since:.3f}" if isinstance(since, float) else f"--since={since}"] if since else []
    return stream(host, compose(desk, host, *words, "trainer"))


async def offsets(desk: Desk) -> dict[Host, float]:
    """How far each host's clock is ahead of ours, in seconds; hosts that do not answer are named and left out."""
    found = {}
    results = await everywhere(desk, "date +%s.%N", deadline=CONNECT + 1)
    failed = complaints(results)
    for result in results:
        if result.host in failed:
            continue
        found[result.host] = clock_ahead(result, result.text)
    if not found:
        raise UserError("No host answers.", 1)
    return found
