"""One stream of many: order, folding, and lines that do not end where a read ends."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest

from app.config.settings import read_settings
from app.fleet.hosts import Desk, Host
from app.fleet.logs import Folder, Line, Reader, merged, offsets
from app.fleet.remote import Result

A, B = Host(name="gpu-a", rank=0), Host(name="gpu-b", rank=1)


def line(second: float, host: Host, rank: int | None, text: str) -> Line:
    return Line(second, host, rank, text)


def folded(*lines: Line, hosts: int = 2) -> list[str]:
    folder = Folder(hosts)
    return [text for each in lines for text in folder.add(each)] + list(folder.flush())


def stamped(second: int, text: str) -> bytes:
    return f"2026-11-27T03:00:{second:02d}.500000000Z {text}\n".encode()


async def chunks(*parts: bytes, pause: float = 0.0) -> AsyncGenerator[bytes]:
    for part in parts:
        await asyncio.sleep(pause)
        yield part


def read(streams: Sequence[tuple[Host, AsyncGenerator[bytes]]], hold: float, offset: float = 0.0) -> list[Line]:
    async def all_of() -> list[Line]:
        made = {Reader(host, offset if host == B else 0.0): stream for host, stream in streams}
        return [line async for batch in merged(made, hold) for line in batch]

    return asyncio.run(all_of())


def test_a_line_has_its_host_rank_and_time_wherever_the_stream_was_cut() -> None:
    whole = stamped(1, "[rank 3] step 1") + b"\x1b[2K" + stamped(2, "torchrun-compose: done") + b"torn"
    for cut in range(len(whole)):
        reader = Reader(B)
        lines = [*reader.feed(whole[:cut]), *reader.feed(whole[cut:]), *reader.end()]
        assert [(each.rank, each.text) for each in lines] == [(3, "step 1"), (None, "done"), (None, "torn")]
        assert [each.time - lines[0].time for each in lines] == [0, 1, 1]


def test_what_a_script_prints_cannot_act_on_the_terminal() -> None:
    (found,) = Reader(A).feed(stamped(1, "[rank 0] \x1b]0;title\x07x"))
    assert found.text == "\\x1b]0;title\\x07x"


def test_lines_of_all_hosts_come_in_the_order_of_time() -> None:
    one = chunks(stamped(1, "a1") + stamped(3, "a3"), stamped(5, "a5"))
    two = chunks(stamped(2, "b2"), stamped(4, "b4"), pause=0.01)
    assert [each.text for each in read([(A, one), (B, two)], float("inf"))] == ["a1", "b2", "a3", "b4", "a5"]


def test_a_host_whose_clock_is_ahead_is_put_in_its_place() -> None:
    one, two = chunks(stamped(1, "a1"), stamped(3, "a3")), chunks(stamped(32, "b2"))
    assert [each.text for each in read([(A, one), (B, two)], float("inf"), offset=30)] == ["a1", "b2", "a3"]


def test_a_silent_host_holds_the_others_up_for_no_longer_than_the_hold() -> None:
    async def first() -> float:
        async def silent() -> AsyncGenerator[bytes]:
            await asyncio.sleep(60)
            yield b""

        began = time.monotonic()
        batches = merged({Reader(A): chunks(stamped(1, "a1")), Reader(B): silent()}, 0.05)
        async for batch in batches:
            if batch:
                break
        await batches.aclose()
        return time.monotonic() - began

    assert 0.05 <= asyncio.run(first()) < 5


def test_the_same_line_of_several_ranks_is_one_line_with_their_count() -> None:
    ranks = [(A, 0), (A, 1), (B, 2), (B, 3), (B, 5)]
    assert folded(*(line(1, host, rank, "x") for host, rank in ranks)) == ["[5 ranks: gpu-a 0-1, gpu-b 2-3,5] x"]
    assert folded(line(1, A, None, "x"), line(1, B, None, "x")) == ["[all 2 nodes] x"]
    assert folded(line(1, A, None, "x"), line(1, B, None, "x"), hosts=3) == ["[gpu-a, gpu-b] x"]
    assert folded(line(1, B, 3, "x")) == ["[gpu-b rank 3] x"]


def test_folding_keeps_the_order_of_every_ranks_lines() -> None:
    said = folded(*(line(1, A, rank, text) for rank in (0, 1) for text in ("a", "b", "a")))
    assert said == ["[2 ranks: gpu-a 0-1] a", "[2 ranks: gpu-a 0-1] b", "[2 ranks: gpu-a 0-1] a"]
    crossed = folded(line(1, A, 0, "a"), line(1, A, 0, "b"), line(1, A, 1, "b"), line(1, A, 1, "a"))
    assert crossed == ["[gpu-a rank 0] a", "[2 ranks: gpu-a 0-1] b", "[gpu-a rank 1] a"]


def test_what_is_said_again_later_is_another_line() -> None:
    assert folded(line(1, A, 0, "x"), line(9, A, 1, "x")) == ["[gpu-a rank 0] x", "[gpu-a rank 1] x"]
    # A launcher's line is not a rank's, even if it reads the same.
    assert folded(line(1, A, None, "x"), line(1, A, 1, "x")) == ["[gpu-a] x", "[gpu-a rank 1] x"]


def test_ten_thousand_lines_a_second_are_followed() -> None:
    def stream(host: int) -> AsyncGenerator[bytes]:
        said = [stamped(at // 400 % 60, f"[rank {host * 8 + at % 8}] step {at // 8}") for at in range(10_000)]
        return chunks(*(b"".join(said[at : at + 100]) for at in range(0, len(said), 100)))

    began = time.process_time()
    lines = read([(A, stream(0)), (B, stream(1))], float("inf"))
    count = len(folded(*lines))
    assert (len(lines), count) == (20_000, 1250)
    assert time.process_time() - began < 2


def test_a_difference_of_clocks_that_the_way_there_explains_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers(*_: object, **__: object) -> list[Result]:
        told = {A: b"1000.190000000\n", B: b"1030.100000000\n"}
        return [Result(host=host, code=0, out=out, err="", seconds=0.2, began=1000.0) for host, out in told.items()]

    monkeypatch.setattr("app.fleet.logs.everywhere", answers)
    desk = Desk(project=Path(), settings=read_settings({}, None), hosts=(A, B), folder="x")
    assert asyncio.run(offsets(desk)) == {A: 0.0, B: pytest.approx(30.0)}
