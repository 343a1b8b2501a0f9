"""Who waits for whom: one sentence from what all ranks tell."""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from app.engine.outcome import Stall
from app.gang.messages import Event
from app.gang.round import RoundState
from app.gang.stalls import describe
from app.plan import Plan
from app.supervise import hang
from app.supervise.hang import Silence
from tests.machines.facts import drafted

NODES = {0: "node 0 (10.0.0.1)", 1: "node 1 (10.0.0.2)"}


def stall(
    rank: int, at: str = "train.py:9, in step: dist.all_reduce(x)", name: str = "all_reduce", number: int = 6
) -> Stall:
    return Stall(rank=rank, seconds=60 + rank, at=at, collective=name, group="default_pg", sequence=number)


def told(*stalls: Stall) -> str:
    return describe({NODES[0]: stalls[:2], NODES[1]: stalls[2:]})


def test_the_rank_that_did_not_enter_a_collective_is_named_with_its_node_and_line() -> None:
    asleep = stall(2, "data.py:4, in load: time.sleep(9)", "broadcast", 5)
    assert told(stall(0), stall(1), asleep, stall(3)) == (
        "no rank has moved for 60 s: rank 2 did not enter all_reduce (number 6), where ranks 0, 1 and 3 wait at "
        "train.py:9, in step: dist.all_reduce(x). rank 2 on node 1 (10.0.0.2) is at data.py:4, in load: time.sleep(9)"
    )


def test_ranks_that_entered_different_collectives_are_named_with_theirs() -> None:
    odd = stall(1, "save.py:7, in save: dist.barrier()", "barrier")
    assert told(stall(0), odd, stall(2), stall(3)) == (
        "no rank has moved for 60 s: the ranks entered different collectives: ranks 0, 2 and 3 all_reduce (number 6) "
        "at train.py:9, in step: dist.all_reduce(x); rank 1 barrier (number 6) at save.py:7, in save: dist.barrier()"
    )


def test_data_that_does_not_arrive_is_told_apart_from_a_rank_that_does_not_come() -> None:
    assert "all ranks have entered all_reduce (number 6)" in told(*map(stall, range(4)))


def test_a_rank_before_its_first_collective_is_behind_the_others() -> None:
    new = Stall(rank=3, seconds=70, at="data.py:4, in load: fetch()")
    assert "rank 3 did not enter all_reduce (number 6)" in told(stall(0), stall(1), stall(2), new)


def test_ranks_outside_any_collective_are_each_shown() -> None:
    alone = [Stall(rank=rank, seconds=70, at=f"x.py:{rank}, in f: g()") for rank in range(6)]
    text = told(*alone)
    assert "rank 1 on node 0 (10.0.0.1) entered no collective, is at x.py:1" in text
    assert text.endswith("; and 2 more")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Two ranks on this node, and a patience of 4 s."""
    monkeypatch.setattr(hang, "signs", lambda: tmp_path / "signs")
    settings = {"RUN_DIR": str(tmp_path / "run"), "NPROC_PER_NODE": "2", "HANG_REPORT": "4"}
    found = drafted("laptop", tmp_path / "machine", **settings).plan
    assert found is not None
    assert hang.watched(found)["TORCHRUN_COMPOSE_LOOKS"] == str(tmp_path / "signs")
    found.stall_dir.mkdir(parents=True)
    return found


def writes(plan: Plan, one: Stall) -> None:
    told = {**asdict(one), "seconds": one.seconds + 0.7, "stack": "x", "recorder": [{"state": "scheduled"}]}
    (plan.stall_dir / f"rank{one.rank}.json").write_text(json.dumps(told))


def silence(rank: int, age: float, used: float = 0.0, pid: int = os.getpid()) -> dict[int, Silence]:
    """A rank's last sign of life, seen first `age` seconds ago, when it had used less processor time by `used`."""
    file = hang.signs() / f"rank{rank}"
    file.write_text(str(pid))
    return {rank: Silence(sign=file.stat().st_mtime_ns, since=time.monotonic() - age, used=sum(os.times()[:2]) - used)}


def test_a_node_stands_still_when_all_its_ranks_do(plan: Plan) -> None:
    writes(plan, stall(1))
    assert hang.read_stalls(plan, {}) == ()
    writes(plan, stall(0))
    assert hang.read_stalls(plan, {}) == (stall(0), stall(1))


def test_a_rank_without_a_sign_of_life_that_uses_no_processor_holds_pythons_lock(plan: Plan) -> None:
    writes(plan, stall(1))
    (mute, other) = hang.read_stalls(plan, silence(0, 30))
    assert (mute.rank, mute.seconds, mute.at) == (0, 30, "native code that holds Python's lock (no stack)")
    assert other == stall(1)
    assert "rank 0 did not enter all_reduce (number 6)" in describe({NODES[0]: (mute, other)})


@pytest.mark.parametrize(("age", "used", "pid"), [(3, 0, os.getpid()), (30, 5, os.getpid()), (30, 0, 1 << 30)])
def test_a_rank_that_was_silent_for_a_moment_or_computes_or_has_ended_is_no_hang(
    plan: Plan, age: float, used: float, pid: int
) -> None:
    writes(plan, stall(1))
    assert hang.read_stalls(plan, silence(0, age, used, pid)) == ()


def test_silence_counts_from_the_last_sign_and_from_when_the_rank_computed_no_more(plan: Plan) -> None:
    writes(plan, stall(1))
    for before in (silence(0, 30, used=5), {0: replace(silence(0, 30)[0], sign=1)}, {}):
        assert hang.read_stalls(plan, before) == ()
        assert before[0].since == pytest.approx(time.monotonic(), abs=1)
        quiet = {0: replace(before[0], since=before[0].since - 4)}
        assert [each.rank for each in hang.read_stalls(plan, quiet)] == [0, 1]


def a_round(said: list[str], timeout: float = 100) -> RoundState:
    return RoundState(
        names=NODES,
        stop_grace=30,
        patience=10,
        hang_timeout=timeout,
        halt=lambda why, _grace, reason: said.append(f"{why}: {reason}"),
        tell=said.append,
    )


def stalled(rank: int, *stalls: Stall) -> Event:
    return Event(rank=rank, kind="stalled", stalls=stalls)


def test_a_standstill_is_told_once_when_the_last_node_stands_still_and_withdrawn_when_one_moves() -> None:
    said: list[str] = []
    course = a_round(said)
    course.take(stalled(0, stall(0)), 1000.0)
    assert not said
    course.take(stalled(1, stall(1)), 1001.0)
    course.take(stalled(1, stall(1)), 1002.0)
    assert [text[:31] for text in said] == ["no rank has moved for 60 s: all"]
    course.take(stalled(0), 1003.0)
    assert said[1:] == ["progress resumed"]
    course.check_hang(5000.0)
    assert len(said) == 2


def test_only_hang_timeout_ends_a_job_that_stands_still() -> None:
    for timeout, ends in ((0.0, False), (100.0, True)):
        said: list[str] = []
        course = a_round(said, timeout)
        course.take(stalled(0, stall(0)), 1000.0)
        course.take(stalled(1, stall(1, number=5)), 1000.0)
        course.check_hang(1039.0)
        assert len(said) == 1
        course.check_hang(1041.0)
        assert said[1:] == (["failure: the job hangs (HANG_TIMEOUT=100)"] if ends else [])
        assert [failure.what[:33] for failure in course.failures] == ["hangs: no rank has moved for 60 s"] * ends


def test_what_a_node_says_that_waits_for_the_next_round_ends_none_but_its_stop_does() -> None:
    said: list[str] = []
    round_ = a_round(said)
    for event in (Event(rank=2, kind="failing"), stalled(2, stall(9)), Event(rank=2, kind="ended", code=1)):
        round_.take(event, 1.0)
    assert said == []
    round_.take(Event(rank=2, kind="stop"), 1.0)
    assert said == ["stop: stopped on node 2"]
