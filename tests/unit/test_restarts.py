"""How long the parts of a restart took, from the moments of two torchruns and the marks of a script."""

import threading
from dataclasses import replace
from pathlib import Path

from app.cli.report import reports
from app.engine.outcome import Moments
from app.report.history import forget_restarts, keep_restart, read_restarts, restart_in_words
from app.supervise.restarts import follow, parts, read_marks
from tests.unit.launch_facts import card, machine, planned

BEFORE = Moments(launched=1.0, begun=2.0, died=100.0, told=100.1, ended=100.4)
AFTER = Moments(launched=101.0, begun=101.2)
MARKS = {"rendezvous": 101.5, "checkpoint load": 102.0, "first step": 102.25}


def test_every_part_has_its_seconds_and_together_they_are_the_whole() -> None:
    found = parts(BEFORE, AFTER, MARKS)
    assert found == {
        "detection": 0.1,
        "stop": 0.3,
        "agreement": 0.6,
        "fork": 0.2,
        "rendezvous": 0.3,
        "checkpoint load": 0.5,
        "first step": 0.25,
    }
    assert round(sum(found.values()), 3) == 2.25
    assert restart_in_words(found).startswith("restarted in 2.25 s: detection 0.10, stop 0.30")


def test_a_part_whose_beginning_or_end_nobody_saw_is_left_out() -> None:
    other_node = replace(BEFORE, died=0.0)
    assert [*parts(other_node, AFTER, {})] == ["stop", "agreement", "fork"]
    assert [*parts(BEFORE, AFTER, {"first step": 102.0})] == ["detection", "stop", "agreement", "fork"]


def test_the_first_mark_of_a_name_counts_and_whatever_is_no_mark_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "marks"
    assert read_marks(file) == {}
    file.write_bytes(b"rendezvous 101.5\nrendezvous 105\nno time here\n\xff\n\nfirst step 102.25\ntorn 1")
    assert read_marks(file) == {"rendezvous": 101.5, "first step": 102.25, "torn": 1.0}


def test_a_restart_is_told_once_at_its_first_step_or_at_its_end(tmp_path: Path) -> None:
    file, over, found = tmp_path / "marks", threading.Event(), list[object]()
    file.write_text("".join(f"{name} {at}\n" for name, at in MARKS.items()))
    follow(BEFORE, AFTER, file, over, found.append)
    assert found == [parts(BEFORE, AFTER, MARKS)]
    file.write_text("rendezvous 101.5\n")
    over.set()
    follow(BEFORE, AFTER, file, over, found.append)
    assert found[1:] == [parts(BEFORE, AFTER, {"rendezvous": 101.5})]


def test_report_shows_the_restarts_of_a_job_that_has_not_failed(tmp_path: Path) -> None:
    host = machine(card("eth0", "10.0.0.1/24"))
    plan = planned(host, TRAIN_SCRIPT=__file__, RUNS_ROOT=str(tmp_path))
    plan.log_dir.mkdir(parents=True)
    for seconds in (1.0, 2.0):
        keep_restart(plan, "run", {"fork": seconds})
    assert read_restarts(plan.log_dir) == ({"fork": 1.0}, {"fork": 2.0})
    assert reports(plan.script.run_dir).splitlines() == [
        "node0: restarted in 1.00 s: fork 1.00",
        "",
        "node0: restarted in 2.00 s: fork 2.00",
    ]
    forget_restarts(plan)
    assert read_restarts(plan.log_dir) == ()
