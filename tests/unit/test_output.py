"""What ranks print becomes whole lines, and a disk without room costs the files, not the lines."""

import errno
import os
import threading
from pathlib import Path

import pytest

from app.engine import output
from app.engine.output import Lines, LogFile, Output


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_are_whole_and_the_last_one_may_lack_its_end() -> None:
    lines = Lines()
    assert lines.feed(b"a\nb") == b"a\n"
    assert lines.feed(b"c\n\nd") == b"bc\n\n"
    assert lines.end() == b"d\n"
    assert lines.end() == b""


def test_of_a_progress_bar_there_is_its_last_state_and_one_now_and_then() -> None:
    clock = Clock()
    lines = Lines(clock)
    assert lines.feed(b"\r 1%|") == b""
    assert lines.feed(b"\r 2%|\r 3%|") == b""
    clock.now = output.PROGRESS
    assert lines.feed(b"\r 4%|") == b" 4%|\n"
    assert lines.feed(b"\r 5%|") == b""
    assert lines.feed(b"\r100%|\nnext\n") == b"100%|\nnext\n"
    assert lines.feed(b"\r 7%|\r") == b""
    assert lines.end() == b" 7%|\n"
    assert lines.feed(b"from Windows\r\n") == b"from Windows\n"


def test_what_torch_says_of_clients_without_a_name_is_left_out() -> None:
    noise = b"[W1126 socket.cpp:764] [c10d] The hostname of the client socket cannot be retrieved. err=-3\n"
    assert Lines().feed(b"a\n" + noise + b"b\n") == b"a\nb\n"


def test_a_line_without_an_end_is_cut() -> None:
    lines = Lines()
    assert lines.feed(b"x" * (output.LONGEST_LINE + 1)) == b"x" * (output.LONGEST_LINE + 1) + b"\n"
    assert lines.end() == b""


def test_a_file_is_begun_anew_at_its_limit_and_one_older_is_kept(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "stdout.log", 10, lost=pytest.fail)
    for number in range(4):
        file.write(b"line %d\n" % number)
    file.close()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "stdout.log": "line 3\n",
        "stdout.log.1": "line 2\n",
    }


def test_without_room_it_is_told_once_and_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(), list[str]()
    file = LogFile(tmp_path / "stdout.log", 100, lost=told.append, clock=clock)

    def full(_descriptor: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        file.write(b"a\n")
        file.write(b"b\n")
        clock.now += output.RETRY
        file.write(b"c\n")
    clock.now += output.RETRY
    file.write(b"d\n")
    file.close()
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert (tmp_path / "stdout.log").read_bytes() == b"d\n"


def test_zero_bytes_are_no_file(tmp_path: Path) -> None:
    LogFile(tmp_path / "stdout.log", 0, lost=pytest.fail).write(b"a\n")
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_come_out_in_lines_with_their_rank(tmp_path: Path) -> None:
    read, write = os.pipe()
    files = {0: tmp_path / "0", 1: tmp_path / "1"}
    ranks = Output(write, {0: "[rank 4] "}, files, 1000, threading.Lock())
    ends = {rank: Path(path).open("wb") for rank, path in ranks.paths().items()}  # noqa: SIM115 - closed one by one
    ranks.start()
    ends[0].write(b"a\nb")
    ends[1].write(b"c\n")
    for end in ends.values():
        end.close()
    ranks.stop()
    os.close(write)
    assert sorted(os.read(read, 1000).splitlines()) == [b"[rank 1] c", b"[rank 4] a", b"[rank 4] b"]
    os.close(read)
    assert (files[0].read_bytes(), files[1].read_bytes()) == (b"a\nb\n", b"c\n")


def test_a_rank_that_prints_nothing_has_an_empty_file(tmp_path: Path) -> None:
    ranks = Output(1, {}, {0: tmp_path / "0"}, 1000, threading.Lock())
    ranks.paths()
    ranks.start()
    ranks.stop()
    assert (tmp_path / "0").read_bytes() == b""


def test_a_pipe_that_somebody_keeps_open_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "DRAIN", 0.05)
    read, write = os.pipe()
    ranks = Output(write, {}, {0: tmp_path / "0"}, 1000, threading.Lock())
    with Path(ranks.paths()[0]).open("wb", buffering=0) as end:
        ranks.start()
        end.write(b"a\n")
        assert os.read(read, 100) == b"[rank 0] a\n"
        ranks.stop()
        assert ranks.stopped()
    for descriptor in (read, write):
        os.close(descriptor)
