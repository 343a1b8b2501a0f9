"""One node: the script runs as plain Python would run it, its end is the exit code, nothing is left behind."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.native.launchers import nodes

MANNERS = """
import multiprocessing, os, pickle, sys
from dataclasses import dataclass

@dataclass
class Item:
    value: int

def double(item):
    return Item(item.value * 2)

if __name__ == "__main__":
    assert sys.modules["__main__"].Item is Item
    assert __file__ == sys.argv[0], (__file__, sys.argv)
    assert sys.path[0] == os.path.dirname(os.path.abspath(__file__)), sys.path
    assert pickle.loads(pickle.dumps(Item(3))) == Item(3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(double, [Item(4)]) == [Item(8)]
    print("as usual", sys.argv[1:], flush=True)
"""
RAISES = """
import os, time
if os.environ["LOCAL_RANK"] == "1":
    raise ValueError("bad batch\\nsecond line")
time.sleep(60)
"""
EXITS = """
import os, sys, time
time.sleep(60 * (os.environ["LOCAL_RANK"] == "0"))
sys.exit(7)
"""
LEAVES_A_CHILD = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", __file__], start_new_session=True)
print("left a child", flush=True)
"""
WAITS = """
import time
print("waits", flush=True)
time.sleep(600)
"""


def test_a_script_sees_what_python_gives_it_and_its_spawned_workers_find_its_classes(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, MANNERS, NODES="", NODE_RANK="") as job:
        launcher = job.start(0, "--steps", "a b")
        assert launcher.end() == 0
    assert "as usual ['--steps', 'a b']" in launcher.text


def test_a_module_runs_as_python_m_runs_it(tmp_path: Path) -> None:
    package = tmp_path / "mine" / "train"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(
        "import sys\nfrom mine.train import model\nassert __spec__.name == 'mine.train.__main__'\n"
        "assert __package__ == 'mine.train'\nprint('module', model.NAME, sys.argv[0][-11:], sys.argv[1:])\n"
    )
    (package / "model.py").write_text("NAME = 'small'")
    with nodes(tmp_path, 1, "", NODES="", NODE_RANK="", PYTHONPATH=str(tmp_path)) as job:
        job.script = Path("-m")
        launcher = job.start(0, "mine.train", "x")
        assert launcher.end() == 0, launcher.text
    assert "module small __main__.py ['x']" in launcher.text


def test_an_exception_without_record_is_told_with_its_rank_and_kept_with_its_traceback(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, RAISES, NODES="", NODE_RANK="", NPROC_PER_NODE="2", MAX_RESTARTS="0") as job:
        launcher = job.start(0)
        assert launcher.end() == 5
    assert "- rank 1 failed with ValueError: bad batch (exit code 1)" in launcher.said[-1]
    assert "launch/worker.py" not in launcher.text, "only the script's own frames are shown"
    [record] = (tmp_path / "node0").glob("*/logs/node0/*.error.json")
    kept = json.loads(record.read_text())
    assert 'raise ValueError("bad batch' in kept["message"]["extraInfo"]["py_callstack"]


def test_the_scripts_own_exit_code_is_told(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, EXITS, NODES="", NODE_RANK="", NPROC_PER_NODE="2", MAX_RESTARTS="0") as job:
        launcher = job.start(0)
        assert launcher.end() == 5
    assert "- rank 1 ended with exit code 7" in launcher.said[-1]


def test_a_process_that_the_script_left_behind_is_ended_with_the_job(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, LEAVES_A_CHILD, NODES="", NODE_RANK="") as job:
        launcher = job.start(0)
        assert launcher.end() == 0
    assert "killed 1 orphaned worker process" in launcher.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_script_and_ends_as_stopped(tmp_path: Path, number: signal.Signals) -> None:
    with nodes(tmp_path, 1, WAITS, NODES="", NODE_RANK="") as job:
        launcher = job.start(0)
        launcher.wait_for("waits")
        launcher.signal(number)
        assert launcher.end() == 143


def test_a_stop_before_the_workers_run_ends_at_once(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, WAITS, NODES="", NODE_RANK="") as job:
        launcher = job.start(0)
        until = time.monotonic() + 20
        while not launcher.preloaded():
            assert time.monotonic() < until
            time.sleep(0.01)
        launcher.signal(signal.SIGTERM)
        assert launcher.end(5) == 143


def test_a_killed_launcher_takes_torchrun_and_the_workers_with_it(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, WAITS, NODES="", NODE_RANK="") as job:
        launcher = job.start(0)
        launcher.wait_for("waits")
        below = [*launcher.preloaded(), *launcher.agents(), *launcher.workers()]
        assert len(below) == 3
        launcher.signal(signal.SIGKILL)
        assert not psutil.wait_procs(below, 3)[1]
