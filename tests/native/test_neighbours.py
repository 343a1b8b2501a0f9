"""A launcher on a machine that is not its own: stalled file systems, lost terminals, signals, orphans, a second job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.native.launchers import ALL_REDUCE, PROJECT, nodes
from tests.native.ports import free_port

TRAINS = r"trains: rank 0"


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """Of one node whose output is the test's own."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "NODES": "127.0.0.1",
        "NPROC_PER_NODE": "2",
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
        "RUNS_ROOT": str(folder / "runs"),
        "MAX_RESTARTS": "0",
        **settings,
    }


def shell(folder: Path, script: str, redirection: str, *arguments: str) -> int:
    """The exit code of a launcher whose output goes where `redirection` says."""
    path = folder / "script.py"
    path.write_text(script)
    command = f'"$@" {redirection}; exit $?'
    entry = [sys.executable, str(PROJECT / "entrypoint.py"), "run", str(path), *arguments]
    done = subprocess.run(
        ["bash", "-c", command, "sh", *entry], env=environment(folder), cwd=folder, timeout=60, check=False
    )
    return done.returncode


COUNTS = """
import os, sys, torch.distributed as dist
dist.init_process_group("gloo")
with open(sys.argv[1], "a") as file:
    file.write("x")
for number in range(300):
    print("line", number, "x" * 200, flush=True)
dist.barrier()
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize("redirection", [">/dev/full 2>&1", ">&- 2>&-", "2>&1 | head -1; exit ${PIPESTATUS[0]}"])
@pytest.mark.parametrize(("ends", "code"), [("0", 0), ("3", 5)])
def test_output_that_cannot_be_written_ends_no_job_and_changes_no_exit_code(
    tmp_path: Path, redirection: str, ends: str, code: int
) -> None:
    ran = tmp_path / "ran"
    assert shell(tmp_path, COUNTS, redirection, str(ran), ends) == code
    assert ran.read_text() == "xx", "each rank ran once"


def test_a_file_system_that_stalls_makes_no_finished_training_a_lost_one(tmp_path: Path) -> None:
    """FAKE: a file server that is gone blocks whoever opens a file, as a pipe without a peer does."""
    run = tmp_path / "node0" / "default"
    (run / "logs" / "node0").mkdir(parents=True)
    os.mkfifo(run / "progress")
    os.mkfifo(run / "logs" / "node0" / "rounds.jsonl")
    with nodes(tmp_path, 2, ALL_REDUCE) as made:
        assert [launcher.end(60) for launcher in made.start_all("10")] == [0, 0]


def test_a_stop_is_heard_though_the_file_system_stalls(tmp_path: Path) -> None:
    run = tmp_path / "node0" / "default"
    (run / "logs" / "node0").mkdir(parents=True)
    os.mkfifo(run / "logs" / "node0" / "rounds.jsonl")
    with nodes(tmp_path, 1, ALL_REDUCE, NPROC_PER_NODE="2") as made:
        launcher = made.start(0, "100000")
        launcher.wait_for(TRAINS)
        launcher.signal(signal.SIGTERM)
        assert launcher.end(20) == 143


def test_sigquit_stops_the_job_like_the_others(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, ALL_REDUCE, NPROC_PER_NODE="2") as made:
        launcher = made.start(0, "100000")
        launcher.wait_for(TRAINS)
        launcher.signal(signal.SIGQUIT)
        assert launcher.end(20) == 143


def test_signals_after_the_verdict_change_no_exit_code(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, ALL_REDUCE, NPROC_PER_NODE="2") as made:
        launcher = made.start(0, "5")
        launcher.wait_for("done: all workers")
        while launcher.process.poll() is None:
            launcher.signal(signal.SIGTERM)
            time.sleep(0.001)
        assert launcher.end() == 0


ORPHANS = """
import os, subprocess, sys, time
for number in range(100):
    subprocess.run(["sh", "-c", "sleep 0.01 &"])
print("trains: rank", os.environ["RANK"], flush=True)
time.sleep(4)
"""


def test_orphans_are_reaped_while_the_job_runs(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, ORPHANS, NPROC_PER_NODE="1") as made:
        launcher = made.start(0)
        launcher.wait_for(TRAINS)
        until = time.monotonic() + 3
        while len(found := psutil.Process(launcher.process.pid).children()) > 1:
            assert time.monotonic() < until, found
            time.sleep(0.05)
        assert launcher.end() == 0


def test_a_torchrun_that_is_stopped_is_told_of_and_goes_on(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, ALL_REDUCE, NPROC_PER_NODE="2") as made:
        launcher = made.start(0, "40")
        launcher.wait_for(TRAINS)
        (agent,) = launcher.agents()
        agent.suspend()
        launcher.wait_for(rf"kill -CONT {agent.pid}", 5)
        agent.resume()
        assert launcher.end() == 0


def test_a_second_job_of_the_same_name_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, ALL_REDUCE, NPROC_PER_NODE="2") as made:
        first = made.start(0, "100000")
        first.wait_for(TRAINS)
        second = made.start(0, "5", MASTER_PORT=str(free_port()))
        assert second.end() == 2
        assert "RUN_NAME" in second.text
        beside = made.start(0, "5", MASTER_PORT=str(free_port()), RUN_NAME="other")
        assert beside.end() == 0
        assert first.process.poll() is None
        first.signal(signal.SIGTERM)
        assert first.end() == 143
