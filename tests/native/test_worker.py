"""The wrapper around every script leaves as Python does, except that the interpreter is not taken down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native.ports import free_port

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


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("run.sh", 'echo "rank $RANK has $1"\nexit 3\n', "rank 1 has an argument"),
        ("run", '#!/bin/sh -e\necho "rank $RANK has $1"\nexit 3\n', "rank 1 has an argument"),
        ("tool", '#!/usr/bin/env python3\nimport os, sys\nprint("rank", os.environ["RANK"])\nsys.exit(3)\n', "rank 1"),
    ],
)
def test_a_worker_becomes_the_program_that_is_no_python(tmp_path: Path, name: str, text: str, told: str) -> None:
    script = tmp_path / name
    script.write_text(text)
    command = [sys.executable, str(WORKER), str(script), "an argument"]
    environment = {**os.environ, "RANK": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (ended.returncode, told in ended.stdout) == (3, True)


JOINED = "import torch.distributed as dist\ndist.init_process_group('gloo')\ndist.destroy_process_group()\n"


@pytest.mark.parametrize(
    ("text", "rank", "world", "told"),
    [
        ("import torch\n", "0", "2", True),
        ("import torch\n", "1", "2", False),
        ("import torch\n", "0", "1", False),
        ("print('no torch')\n", "0", "2", False),
        (JOINED, "0", "1", False),
        (JOINED.replace("'gloo'", "'gloo', rank=0, world_size=1"), "0", "2", False),
    ],
)
def test_ranks_that_never_met_are_told_once(tmp_path: Path, text: str, rank: str, world: str, told: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": rank, "WORLD_SIZE": world}
    environment = {**os.environ, **meeting}
    command = [sys.executable, str(WORKER), str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ("never called init_process_group" in ended.stderr) == told
