"""The wrapper around every script leaves as Python does, except that the interpreter is not taken down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[2] / "app/engine/worker.py"
SCRIPT = """
import atexit, sys, threading, time

class Torn:
    def __del__(self):
        print("torn down", flush=True)

torn = Torn()
atexit.register(print, "exit handler")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
print("buffered", end=" ")
"""


def _run(folder: Path, ending: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT + ending)
    return subprocess.run([sys.executable, WORKER, script], capture_output=True, text=True, timeout=60, check=False)


def test_exit_handlers_threads_and_buffers_are_served_before_a_worker_leaves(tmp_path: Path) -> None:
    ended = _run(tmp_path, "")
    assert (ended.returncode, ended.stdout) == (0, "buffered thread done\nexit handler\n")


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no data')", 1, "no data"),
        ("sys.exit()", 0, ""),
        ("raise ValueError('bad')", 1, "ValueError: bad"),
    ],
)
def test_a_worker_leaves_with_the_exit_code_of_its_script(tmp_path: Path, ending: str, code: int, told: str) -> None:
    ended = _run(tmp_path, ending)
    assert ended.returncode == code
    assert told in ended.stderr
    assert "torn down" not in ended.stdout
