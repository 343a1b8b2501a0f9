"""Who waits for whom: one sentence from what all ranks tell."""

import json
import os
import queue
import signal
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from app.engine.outcome import Collective, Explanation, Stall
from app.engine.watchdog import Sample, activity, has_worked
from app.gang.messages import Event, WorkerReport
from app.gang.round import RoundState
from app.gang.stalls import describe
from app.gang.verdict import first_causes
from app.plan import Plan
from app.supervise import hang, progress
from app.supervise.hang import StalledHeartbeat
from tests.machines.facts import drafted
from tests.testbed.shell import until

NODES = {0: "node 0 (10.0.0.1)", 1: "node 1 (10.0.0.2)"}


def entered(name: str = "all_reduce", number: int = 6, data: str = "float32[10]", *, done: bool = False) -> Collective:
    return Collective(name=name, sequence=number, group="gloo:0:default_pg", data=data, done=done)


def stall(rank: int, *collectives: Collective, at: str = "train.py:9, in step: dist.all_reduce(x)") -> Stall:
    return Stall(rank=rank, seconds=60 + rank, at=at, entered=collectives or (entered(number=5, done=True), entered()))


def told(*stalls: Stall) -> str:
    return describe({NODES[0]: stalls[:2], NODES[1]: stalls[2:]})


def test_the_rank_that_has_not_reached_a_collective_is_named_with_its_node_and_line() -> None:
    asleep = stall(2, entered("broadcast", 5, done=True), at="data.py:4, in load: time.sleep(9)")
    assert told(stall(0), stall(1), asleep, stall(3)) == (
        "no progress on any rank for 60 s: rank 2 has not reached all_reduce #6; ranks 0, 1, 3 are blocked in it at "
        "train.py:9, in step: dist.all_reduce(x). rank 2 on node 1 (10.0.0.2) is at data.py:4, in load: time.sleep(9)"
    )


def test_ranks_that_entered_different_collectives_are_named_with_theirs() -> None:
    odd = stall(1, entered("barrier"), at="save.py:7, in save: dist.barrier()")
    assert told(stall(0), odd, stall(2), stall(3)) == (
        "no progress on any rank for 60 s: the ranks entered different collectives: ranks 0, 2, 3 all_reduce #6 "
        "at train.py:9, in step: dist.all_reduce(x); rank 1 barrier #6 at save.py:7, in save: dist.barrier()"
    )


def test_ranks_that_put_different_data_into_a_collective_are_named_with_it() -> None:
    text = told(stall(0), stall(1, entered(data="float32[20]")), stall(2), stall(3))
    assert "entered all_reduce #6 with different data: rank 1 with float32[20]; ranks 0, 2, 3 with float32[10]" in text


@pytest.mark.parametrize(
    ("name", "done"), [("all_to_all", False), ("gather", False), ("scatter", False), ("all_reduce", True)]
)
def test_uneven_data_is_legal_in_some_collectives_and_past_in_those_that_are_done(name: str, done: bool) -> None:
    ranks = [stall(rank, entered(name, 5, f"float32[{rank}]", done=done), entered()) for rank in range(4)]
    assert "different" not in told(*ranks)


def test_what_ran_ahead_is_compared_by_its_number_not_as_the_newest() -> None:
    """NCCL's collectives are entered long before they are done."""
    ahead = stall(0, entered(number=6, data="float32[20]"), entered(number=7), entered(number=8))
    assert "entered all_reduce #6 with different data" in told(ahead, stall(1, entered(number=6), entered(number=7)))


def test_groups_are_told_apart_by_name_and_backend() -> None:
    tensor = Collective(name="all_reduce", sequence=900, group="nccl:3:mesh_tp")
    pair = [stall(rank, tensor) for rank in (2, 3)]
    text = told(stall(0), stall(1), *pair)
    assert "ranks 2, 3 have not reached all_reduce #6; ranks 0, 1 are blocked in it" in text
    late = stall(3, Collective(name="all_reduce", sequence=899, group="nccl:3:mesh_tp", done=True))
    text = told(stall(0), stall(1), stall(2, tensor), late)
    assert "rank 3 has not reached all_reduce #900 of process group mesh_tp; rank 2 is blocked in it" in text


def test_of_a_group_that_was_never_used_its_members_are_known() -> None:
    group = "gloo:1:undefined"
    unused = Collective(name="", sequence=0, group=group, done=True)
    first = Collective(name="all_reduce", sequence=1, group=group)
    text = told(stall(0), stall(1, unused, entered(number=5, done=True)), stall(2, first), stall(3))
    assert "rank 1 has not reached all_reduce #1 of process group 1; rank 2 is blocked in it" in text


def test_the_last_collective_of_each_group_is_kept_whatever_came_later() -> None:
    """A rank without it would count as one that has not come."""
    busy = [Collective(name="all_reduce", sequence=number, group="nccl:3:mesh_tp") for number in range(1, 30)]
    kept = hang.newest([entered(), *busy])
    assert kept == (entered(), *busy[-7:])
    assert hang.newest(busy[:3]) == tuple(busy[:3])


def test_a_rank_that_has_ended_while_others_wait_points_to_unequal_numbers_of_steps() -> None:
    ended = Stall(rank=1, seconds=0, at="", entered=(entered(number=5, done=True),), ended=True)
    assert told(stall(0), ended) == (
        "no progress on any rank for 60 s: rank 1 has ended after all_reduce #5, while rank 0 is blocked in "
        "all_reduce #6 at train.py:9, in step: dist.all_reduce(x): unequal numbers of batches or steps?"
    )


def test_data_that_does_not_arrive_is_told_apart_from_a_rank_that_does_not_come() -> None:
    assert "all ranks are blocked in all_reduce #6" in told(*map(stall, range(4)))


def test_a_rank_before_its_first_collective_is_behind_the_others() -> None:
    new = Stall(rank=3, seconds=70, at="data.py:4, in load: fetch()")
    assert "rank 3 has not reached all_reduce #6" in told(stall(0), stall(1), stall(2), new)


def test_ranks_outside_any_collective_are_each_shown() -> None:
    alone = [Stall(rank=rank, seconds=70, at=f"x.py:{rank}, in f: g()") for rank in range(6)]
    text = told(*alone)
    assert "rank 1 on node 0 (10.0.0.1) has entered no collective, is at x.py:1" in text
    assert text.endswith("; and 2 more")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two ranks on this node, and a patience of 4 s."""
    settings = {"RUN_DIR": str(tmp_path / "run"), "NPROC_PER_NODE": "2", "HANG_REPORT": "4"}
    found = drafted("laptop", tmp_path / "machine", **settings).plan
    assert found is not None
    folder = tmp_path / "ranks"
    folder.mkdir()
    assert hang.watched(found, folder) == {"TORCHRUN_COMPOSE_STALLS": f"4:{folder}"}
    return found


def write(folder: Path, one: Stall) -> None:
    told = {**asdict(one), "seconds": one.seconds + 0.7, "stack": "x", "recorder": [{"state": "scheduled"}]}
    (folder / "ranks" / f"rank{one.rank}.{'ended' if one.ended else 'json'}").write_text(json.dumps(told))


def read(plan: Plan, folder: Path, heartbeats: dict[int, StalledHeartbeat] | None = None) -> tuple[Stall, ...]:
    return hang.read_stalls(plan, folder / "ranks", {} if heartbeats is None else heartbeats)


def heartbeat(folder: Path, rank: int, age: float, used: float = 0, pid: int = 0) -> dict[int, StalledHeartbeat]:
    """A rank's last heartbeat, seen first `age` seconds ago, when it had used less processor time by `used`."""
    file = folder / "ranks" / f"rank{rank}"
    file.write_text(str(pid or os.getpid()))
    seconds = activity(os.getpid()).seconds - used
    return {rank: StalledHeartbeat(beat=file.stat().st_mtime_ns, since=time.monotonic() - age, seconds=seconds)}


def test_a_node_stands_still_when_all_its_ranks_do(plan: Plan, tmp_path: Path) -> None:
    write(tmp_path, stall(1))
    assert read(plan, tmp_path) == ()
    write(tmp_path, stall(0))
    assert read(plan, tmp_path) == (stall(0), stall(1))


def test_a_rank_that_has_ended_waits_for_nobody_and_its_last_stall_is_forgotten(plan: Plan, tmp_path: Path) -> None:
    ended = replace(stall(0), ended=True, at="")
    for one in (ended, stall(1)):
        write(tmp_path, one)
    # Its process has gone, and its last heartbeat is still there.
    (tmp_path / "ranks" / "rank0").write_text(str(1 << 30))
    # The other one may have waited for it until now, and takes its own stall back in a moment.
    assert read(plan, tmp_path) == ()
    long_ago = time.time() - plan.timeouts.hang_report
    os.utime(tmp_path / "ranks" / "rank0.ended", (long_ago, long_ago))
    write(tmp_path, stall(0))
    assert read(plan, tmp_path) == (ended, stall(1))


@pytest.mark.parametrize("engine", [0, 1])
def test_what_moves_while_a_round_is_ended_is_no_progress_that_forgets_the_stacks(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: int
) -> None:
    monkeypatch.setattr(progress, "READ_EVERY", 0.02)
    looks, made, kept = queue.Queue[int](), list[progress.TrainingProgress](), plan.stall_dir / "rank1.json"
    for rank in range(2):
        write(tmp_path, stall(rank))

    def asked() -> int:
        looks.put(len(made[0].stalls) if made else 2)
        return engine

    made.append(progress.TrainingProgress(plan, tmp_path / "ranks", print, asked))
    until(kept.exists, deadline=5, what="the stacks")
    (tmp_path / "ranks" / "rank0.json").unlink()
    while looks.get(timeout=5) or looks.get(timeout=5):
        pass
    until(lambda: kept.exists() == (engine == 0), deadline=5, what="the end of the stacks, or not")


def test_stacks_are_kept_for_the_report_and_forgotten_when_progress_resumes(plan: Plan, tmp_path: Path) -> None:
    write(tmp_path, stall(1))
    hang.keep_stalls(plan, tmp_path / "ranks")
    assert all(file.stat().st_mode & 0o077 == 0 for file in plan.stall_dir.iterdir())
    assert "stack" in json.loads((plan.stall_dir / "rank1.json").read_text())
    hang.forget_stalls(plan)
    assert list(plan.stall_dir.iterdir()) == []


def test_a_rank_without_a_heartbeat_that_uses_no_processor_holds_the_gil(plan: Plan, tmp_path: Path) -> None:
    write(tmp_path, stall(1))
    (silent, other) = read(plan, tmp_path, heartbeat(tmp_path, 0, 30))
    assert (silent.rank, silent.seconds, silent.at) == (0, 30, hang.HOLDS_THE_GIL)
    assert other == stall(1)
    assert "rank 0 has not reached all_reduce #6" in describe({NODES[0]: (silent, other)})


@pytest.mark.parametrize(("age", "used", "pid"), [(3, 0, 0), (30, 5, 0), (30, 0, 1 << 30)])
def test_a_rank_that_was_silent_for_a_moment_or_computes_or_has_ended_is_no_hang(
    plan: Plan, tmp_path: Path, age: float, used: float, pid: int
) -> None:
    write(tmp_path, stall(1))
    assert read(plan, tmp_path, heartbeat(tmp_path, 0, age, used, pid)) == ()


def test_a_rank_that_a_person_has_stopped_does_not_hang(plan: Plan, tmp_path: Path) -> None:
    write(tmp_path, stall(1))
    with subprocess.Popen(["sleep", "60"]) as rank:
        heartbeats = {0: replace(heartbeat(tmp_path, 0, 30, pid=rank.pid)[0], seconds=activity(rank.pid).seconds)}
        assert [each.rank for each in read(plan, tmp_path, dict(heartbeats))] == [0, 1]
        rank.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, rank.pid, os.WSTOPPED)
        assert read(plan, tmp_path, heartbeats) == ()
        rank.kill()


def test_silence_counts_from_the_last_heartbeat_and_from_when_the_rank_computed_no_more(
    plan: Plan, tmp_path: Path
) -> None:
    write(tmp_path, stall(1))
    for before in (
        heartbeat(tmp_path, 0, 30, used=5),
        {0: replace(heartbeat(tmp_path, 0, 30)[0], beat=1)},
        dict[int, StalledHeartbeat](),
    ):
        assert read(plan, tmp_path, before) == ()
        assert before[0].since == pytest.approx(time.monotonic(), abs=1)
        quiet = {0: replace(before[0], since=before[0].since - 4)}
        assert [each.rank for each in read(plan, tmp_path, quiet)] == [0, 1]


def process(proc: Path, pid: int, parent: int, ticks: tuple[int, int, int, int], moved: int = 0) -> None:
    """FAKE: a process as the kernel shows it."""
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    user, system, children_user, children_system = ticks
    before = f"{pid} (a) b) S {parent} 0 0 0 0 0 0 0 0 0"
    (folder / "stat").write_text(f"{before} {user} {system} {children_user} {children_system} 20 0\n")
    (folder / "io").write_text(f"rchar: {moved}\nwchar: 1\nsyscr: 9\nread_bytes: 0\nwrite_bytes: 0\n")


def test_all_processes_below_a_rank_count_as_its_own(tmp_path: Path) -> None:
    process(tmp_path, 10, 1, (100, 0, 7, 0), moved=5)
    process(tmp_path, 11, 10, (20, 1, 0, 0))
    process(tmp_path, 12, 11, (3, 0, 0, 0), moved=2)
    process(tmp_path, 13, 1, (1000, 0, 0, 0))
    (tmp_path / "uptime").touch()
    found = activity(10, proc=str(tmp_path))
    assert found.seconds * os.sysconf("SC_CLK_TCK") == 131
    assert (found.moved, found.states) == (10, "SSS")
    assert activity(10, alone=True, proc=str(tmp_path)).states == "S"
    with pytest.raises(OSError, match="No such"):
        activity(14, proc=str(tmp_path))


STILL = Sample(time=0, seconds=0, moved=0, states="SS", written_back=0, gpu=0, recorded=[])


@pytest.mark.parametrize(
    ("change", "works"),
    [
        ({}, False),
        ({"seconds": 0.1, "moved": 10_000, "states": "DSZ", "written_back": 20}, False),
        ({"seconds": 0.5}, True),
        ({"seconds": -0.5}, True),
        ({"moved": 60_000}, True),
        ({"states": "ST"}, True),
        ({"states": "St"}, True),
        ({"states": "DS", "written_back": 300}, True),
        ({"written_back": 300}, False),
        ({"gpu": 1}, True),
        ({"recorded": [(7, "completed")]}, True),
    ],
)
def test_a_rank_works_when_anything_of_it_does(change: dict[str, Any], works: bool) -> None:
    assert has_worked(STILL, STILL._replace(time=5, **change)) is works


def a_round(said: list[str], timeout: float = 100) -> RoundState:
    return RoundState(
        names=NODES,
        stop_grace=30,
        patience=10,
        hang_report=60,
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
    assert [text[:31] for text in said] == ["no progress on any rank for 60 "]
    course.take(stalled(0), 1003.0)
    assert said[1:] == ["progress resumed"]
    course.check_hang(5000.0)
    assert len(said) == 2


@pytest.mark.parametrize(
    ("rank", "exitcode", "cause"),
    [
        (0, 1, "the job"),
        (0, -signal.SIGABRT, "the job"),
        (0, -signal.SIGKILL, NODES[0]),
        (1, 1, NODES[1]),
    ],
)
def test_what_a_rank_dies_of_that_was_blocked_in_a_hang_is_a_consequence(rank: int, exitcode: int, cause: str) -> None:
    """torch's time-out ends the rank that waits, in words of its own; the rank that did not come is the cause, and its
    own words say more than the hang does."""
    course = a_round([])
    course.take(stalled(0, stall(0)), 1000.0)
    course.take(stalled(1, stall(1, entered(number=5, done=True))), 1000.0)
    course.take(Event(rank=rank, kind="failing"), 1100.0)
    for node in NODES:
        course.take(stalled(node), 1101.0)
    found = Explanation(words="AssertionError" if exitcode > 0 else "")
    report = WorkerReport(rank=rank, exitcode=exitcode, found=found, time=5, halted=False)
    course.take(Event(rank=rank, kind="ended", code=1, report=report), 1102.0)
    assert [each.node for each in first_causes(course.failures)] == [cause]


def test_a_node_that_has_finished_does_not_hide_that_the_others_wait() -> None:
    said: list[str] = []
    course = a_round(said)
    course.take(stalled(0, stall(0)), 1000.0)
    course.take(Event(rank=1, kind="ended", code=0, finished="5 collectives"), 1001.0)
    # Rank 0 may have waited for it until now, and takes its stall back in a moment.
    course.check_hang(1060.0)
    assert not said
    course.check_hang(1061.0)
    assert len(said) == 1
    assert said[0].endswith("; node 1 (10.0.0.2) had finished after 5 collectives")
    course.take(stalled(0), 1002.0)
    assert said[1:] == ["progress resumed"]


def test_a_rank_that_rests_after_the_others_have_finished_keeps_nobody() -> None:
    said: list[str] = []
    course = a_round(said)
    course.take(stalled(0, stall(0, entered(number=5, done=True))), 1000.0)
    course.take(Event(rank=1, kind="ended", code=0), 1001.0)
    course.check_hang(1100.0)
    assert said == []
    # It may wait, for all that is known.
    course.take(stalled(0, stall(0)), 1101.0)
    assert len(said) == 1


def test_a_job_whose_ranks_have_all_ended_does_not_hang() -> None:
    said: list[str] = []
    course = a_round(said)
    for rank in NODES:
        course.take(stalled(rank, Stall(rank=rank, seconds=0, at="", ended=True)), 1000.0)
    assert said == []


def test_only_hang_timeout_ends_a_job_that_stands_still() -> None:
    for timeout, ends in ((0.0, False), (100.0, True)):
        said: list[str] = []
        course = a_round(said, timeout)
        course.take(stalled(0, stall(0)), 1000.0)
        course.take(stalled(1, stall(1, entered(number=5, done=True))), 1000.0)
        course.check_hang(1039.0)
        assert len(said) == 1
        course.check_hang(1041.0)
        assert said[1:] == (["failure: the job hangs (HANG_TIMEOUT=100)"] if ends else [])
        assert [trouble.what[:27] for trouble in course.failures] == ["hangs: no progress on any r"] * ends


def test_what_a_node_says_that_waits_for_the_next_round_ends_none_but_its_stop_does() -> None:
    said: list[str] = []
    round_ = a_round(said)
    for event in (Event(rank=2, kind="failing"), stalled(2, stall(9)), Event(rank=2, kind="ended", code=1)):
        round_.take(event, 1.0)
    assert said == []
    round_.take(Event(rank=2, kind="stop"), 1.0)
    assert said == ["stop: stopped on node 2"]
