"""A job that fails on this machine leaves a report on every node; only real launchers show what each node knows."""

import json
import subprocess
import sys
from pathlib import Path

from tests.native.launchers import ONE_FAILS, PROJECT, nodes

FAILING = """
import os, time
if os.environ["RANK"] == "1":
    raise ValueError("bad batch 7, key hf_abcdefghijklmnopqrst")
time.sleep(60)
"""


def test_each_node_of_a_failed_job_has_a_report_and_the_command_prints_it(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, FAILING, MAX_RESTARTS="0") as made:
        assert [launcher.end(60) for launcher in made.start_all()] == [5, 5]
        assert "report written to " in made.launchers[1].text
    folders = [tmp_path / f"node{rank}/default/report/node{rank}" for rank in (0, 1)]
    first, second = (json.loads((folder / "report.json").read_text()) for folder in folders)
    assert first["verdict"] == second["verdict"]
    assert [(each["halted"], each["message"]) for each in first["rounds"]] == [(True, "")]
    assert [(each["rank"], each["exitcode"]) for each in second["rounds"][0]["failures"]] == [(1, 1)]
    assert second["counters_before"].keys() == second["counters_after"].keys()
    assert "ValueError: bad batch 7" in second["rounds"][0]["traceback"]
    assert any("bad batch 7" in line for line in second["logs"]["local rank 0 stderr"])
    command = [sys.executable, str(PROJECT / "entrypoint.py"), "report"]
    env = {"RUNS_ROOT": str(tmp_path / "node1"), "PATH": "/usr/bin:/bin"}
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
    assert told.returncode == 0, told.stderr
    assert len(told.stdout.splitlines()) <= 15
    assert "first error here: ValueError: bad batch 7" in told.stdout
    packed = subprocess.run([*command, "--bundle", "-"], cwd=tmp_path, env=env, capture_output=True, timeout=30)
    listed = subprocess.run(["tar", "xzO"], input=packed.stdout, capture_output=True, timeout=30)
    assert b"bad batch 7" in listed.stdout
    assert b"hf_abcdefghijklmnopqrst" not in listed.stdout


def test_an_unknown_exception_is_not_explained_by_the_complaint_of_its_neighbour(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, ONE_FAILS, MAX_RESTARTS="0", NPROC_PER_NODE="2") as made:
        assert made.start(0).end(60) == 5
        assert "rank 1 failed with ValueError: bad batch" in made.launchers[0].said[-1]
    report = json.loads((tmp_path / "node0/default/report/node0/report.json").read_text())
    assert (report["rounds"][0]["message"], report["known_error"]) == ("ValueError: bad batch", "")


KILLED = """
import os, signal, time
from pathlib import Path
started = Path(os.environ["RUN_DIR"], os.environ["TORCHELASTIC_RUN_ID"])
if os.environ["RANK"] == "0":
    started.touch()
if os.environ["RANK"] == "1":
    print("step 1", flush=True)
    while not started.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def test_a_worker_that_is_killed_is_the_first_error_of_its_node_and_all_say_what_that_means(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, KILLED, MAX_RESTARTS="1", RUNS_ROOT=str(tmp_path / "shared")) as made:
        assert [launcher.end(60) for launcher in made.start_all()] == [5, 5]
        for launcher in made.launchers:
            cause, fix, kept, verdict = launcher.said[-4:]
            assert cause.startswith("cause: The worker was killed from outside")
            assert fix.startswith("fix: `dmesg")
            assert kept.startswith("report written to ")
            assert "rank 1 was ended by SIGKILL" in verdict
    folders = [tmp_path / f"shared/default/report/node{rank}" for rank in (0, 1)]
    first, second = ((folder / "report.txt").read_text() for folder in folders)
    assert "first error here: none, no worker of this node failed by itself" in first
    assert "first error here: rank 1 was ended by SIGKILL\nfailed rounds here: 2" in second
    kept = json.loads((folders[1] / "report.json").read_text())
    assert [[one["exitcode"] for one in each["failures"]] for each in kept["rounds"]] == [[-9], [-9]]
    assert kept["logs"]["local rank 0 stdout"] == ["step 1"]
    assert not json.loads((folders[0] / "report.json").read_text())["logs"].get("local rank 0 stdout")


def test_a_job_that_ends_well_leaves_no_report_and_removes_an_older_one(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, FAILING, MAX_RESTARTS="0", NPROC_PER_NODE="2") as made:
        assert made.start(0).end(60) == 5
        assert (tmp_path / "node0/default/report/node0/report.txt").exists()
        made.script.write_text("print('well')")
        assert made.start(0).end(60) == 0
    assert not list(tmp_path.glob("node0/default/report*"))


MEGABYTES = """
missing = "".join(f"layers.{number}.weight, " * 5 for number in range(45_000))
raise RuntimeError(f"Error(s) in loading state_dict: missing keys {missing}")
"""


def test_an_exception_of_megabytes_is_told_by_its_beginning(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, MEGABYTES, MAX_RESTARTS="0") as made:
        assert made.start(0).end(60) == 5
        assert "rank 0 failed with RuntimeError: Error(s) in loading state_dict" in made.launchers[0].said[-1]
        assert "Separator is not found" not in made.launchers[0].text
