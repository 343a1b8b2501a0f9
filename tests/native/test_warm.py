"""To a script nothing differs from plain torchrun, whether it is forked from the preloaded process or started cold."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import psutil
import pytest

from app.engine.command import AGENT, WORKER
from app.engine.torchrun import Torchrun
from app.engine.warm import Preloaded
from tests.native.launchers import PROJECT, nodes
from tests.native.ports import free_port

STATE = PROJECT / "tests/scripts/state.py"
OURS = {"threads", "flags", "limits", "environ", "main", "dies"}
"""What the launcher changes on purpose, warm or cold: see the tests of each."""
PER_RUN = re.compile(
    r"TORCHELASTIC_(RUN_ID|ERROR_FILE)|MASTER_(ADDR|PORT)|RUN_DIR|CHECKPOINT_DIR|.*_FILE|RUNS_ROOT|PRELOAD|NCCL_RAS_ADDR|TORCHRUN_COMPOSE_.*"
)


def _odd_surroundings() -> None:
    """What a script inherits, each unlike the default."""
    os.umask(0o027)
    os.nice(3)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    resource.setrlimit(resource.RLIMIT_STACK, (4 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])


def _run(folder: Path, how: str) -> list[dict[str, Any]]:
    """The state of both ranks."""
    folder.mkdir()
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    environ = {**inherited, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "2", "PYTHONFAULTHANDLER": "1"}
    if how == "torchrun":
        command = ["-m", "torch.distributed.run", "--nnodes=1", "--node-rank=0", "--nproc-per-node=2", "--tee=3"]
        command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", f"--log-dir={folder}", str(STATE)]
    else:
        command = [str(PROJECT / "entrypoint.py"), "run", str(STATE)]
        environ |= {
            "NPROC_PER_NODE": "2",
            "MASTER_PORT": str(free_port()),
            "RUNS_ROOT": str(folder),
            "MAX_RESTARTS": "0",
        }
        environ |= {"PRELOAD": "torch" if how == "warm" else ""}
    ended = subprocess.run(
        [sys.executable, *command, str(folder)],
        env=environ,
        cwd=STATE.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=_odd_surroundings,
    )
    assert ended.returncode == 0, ended.stdout
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("state")
    return {how: _run(folder / how, how) for how in ("torchrun", "cold", "warm")}


def _named(state: dict[str, Any], key: str) -> object:
    """A part of the state without what differs from run to run."""
    if key == "environ":
        return {name: value for name, value in state[key].items() if not PER_RUN.fullmatch(name)}
    if key == "argv":
        return state[key][:1]
    return state[key]


KEYS = [
    "argv",
    "main",
    "path",
    "flags",
    "python",
    "hooks",
    "handlers",
    "mask",
    "wakeup",
    "umask",
    "nice",
    "cpus",
    "limits",
    "oom",
    "ids",
    "leads",
    "dies",
    "folder",
    "descriptors",
    "stdin",
    "outputs",
    "locale",
    "faulthandler",
    "threads",
    "native",
    "depth",
    "collector",
    "logging",
    "process",
    "environ",
    "torch",
    "cuda",
    "filters",
    "work",
    "forked",
]


@pytest.mark.parametrize("key", KEYS)
def test_a_forked_script_finds_what_a_started_one_finds(states: dict[str, list[dict[str, Any]]], key: str) -> None:
    for cold, warm in zip(states["cold"], states["warm"], strict=True):
        assert _named(warm, key) == _named(cold, key)


@pytest.mark.parametrize("key", sorted({*KEYS} - OURS))
def test_a_forked_script_finds_what_plain_torchrun_gives(states: dict[str, list[dict[str, Any]]], key: str) -> None:
    for plain, warm in zip(states["torchrun"], states["warm"], strict=True):
        found, expected = _named(warm, key), _named(plain, key)
        if key == "depth":
            # worker.py's own two frames, warm or cold.
            assert isinstance(found, int)
            assert isinstance(expected, int)
            assert found == expected + 2
        else:
            assert found == expected


def test_nothing_but_the_three_streams_is_open(states: dict[str, list[dict[str, Any]]]) -> None:
    assert [state["descriptors"] for state in states["warm"]] == [[0, 1, 2]] * 2


def test_each_rank_draws_its_own_random_numbers(states: dict[str, list[dict[str, Any]]]) -> None:
    first, second = (state["own"] for state in states["warm"])
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_data_loaders_of_every_start_method_find_the_scripts_classes(states: dict[str, list[dict[str, Any]]]) -> None:
    loaders = [states[how][0]["loaders"] for how in ("torchrun", "cold", "warm")]
    assert loaders[2] == loaders[1] == loaders[0]
    assert [value for value, _ in loaders[2]["spawn"]] == [0, 1, 4, 9]


def test_every_variable_of_plain_torchrun_has_its_value(states: dict[str, list[dict[str, Any]]]) -> None:
    for plain, warm in zip(states["torchrun"], states["warm"], strict=True):
        expected = {name: value for name, value in plain["environ"].items() if not PER_RUN.fullmatch(name)}
        assert {name: warm["environ"].get(name) for name in expected} == expected


def test_each_round_draws_its_own_random_numbers(tmp_path: Path) -> None:
    script = """
        import os, random, sys, numpy, torch
        drawn = [random.random(), numpy.random.random(), torch.initial_seed(), torch.rand(1).item()]
        print("drawn", *drawn, flush=True)
        sys.exit(0 if "-2-" in os.environ["TORCHELASTIC_RUN_ID"] else 1)
    """
    with nodes(tmp_path, 1, dedent(script), NODES="", NODE_RANK="", MAX_RESTARTS="1") as job:
        launcher = job.start(0)
        assert launcher.end() == 0
    first, second = (line.split() for line in re.findall(r"drawn (.*)", launcher.text))
    assert all(one != other for one, other in zip(first, second, strict=True))


LEAVES = """
import atexit, os, sys, threading, time, torch
class Torn:
    def __del__(self):
        print("torn down", flush=True)
torn = Torn()
atexit.register(print, "exit handler")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
print("buffered", end=" ")
if sys.argv[1] == "raise":
    raise ValueError("bad")
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("preload", ["torch", ""])
@pytest.mark.parametrize(("ending", "told"), [("0", "done"), ("3", "exit code 3"), ("raise", "ValueError: bad")])
def test_a_script_ends_as_it_wants_to(tmp_path: Path, ending: str, told: str, preload: str) -> None:
    with nodes(tmp_path, 1, LEAVES, NODES="", NODE_RANK="", MAX_RESTARTS="0") as job:
        launcher = job.start(0, ending, PRELOAD=preload)
        assert launcher.end() == (0 if ending == "0" else 5)
    assert told in launcher.said[-1]
    assert "torn down" not in launcher.text
    written = launcher.text.replace("[rank 0] ", "")
    assert 0 < written.index("buffered") < written.index("thread done") < written.index("exit handler")


WAITS = """
import pathlib, sys, time
print("prints without a flush")
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.02)
"""


def test_processes_are_titled_and_lines_come_at_once(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, WAITS, NODES="", NODE_RANK="", NPROC_PER_NODE="2") as job:
        launcher = job.start(0, str(tmp_path / "go on"))
        launcher.wait_for(r"\[rank 1\] prints")
        launcher.wait_for(r"\[rank 0\] prints")
        titles = {" ".join(each.cmdline()) for each in launcher.workers()}
        names = {each.name() for each in launcher.workers()}
        (preloaded,) = launcher.preloaded()
        assert preloaded.num_threads() == 1
        (tmp_path / "go on").touch()
        assert launcher.end() == 0
    assert "init_process_group" not in launcher.text
    assert titles == {f"rank{rank} {job.script} {tmp_path / 'go on'}" for rank in range(2)}
    assert all(name.startswith("rank") for name in names)


def test_a_killed_preloaded_process_takes_the_round_with_it_and_is_started_again(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, WAITS, NODES="", NODE_RANK="", NPROC_PER_NODE="2") as job:
        launcher = job.start(0, str(tmp_path / "go on"))
        launcher.wait_for(r"\[rank 1\] prints")
        launcher.wait_for(r"\[rank 0\] prints")
        below = [*launcher.agents(), *launcher.workers()]
        assert len(below) == 3
        (first,) = launcher.preloaded()
        first.kill()
        assert not psutil.wait_procs(below, 3)[1]
        (tmp_path / "go on").touch()
        assert launcher.end() == 0
    assert re.search("torchrun was ended by SIGKILL.* All nodes start again", launcher.text)


def test_a_stop_while_torch_is_loaded_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; print('loads', flush=True); time.sleep(60)")
    with nodes(tmp_path, 1, WAITS, NODES="", NODE_RANK="", PRELOAD="slow", PYTHONPATH=str(tmp_path)) as job:
        launcher = job.start(0, "never")
        launcher.wait_for("loads")
        launcher.signal(signal.SIGTERM)
        assert launcher.end(5) == 143


BROKEN = {
    "preload_raises": ("raise ValueError('bad')", "ValueError: bad"),
    "preload_leaves": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "preload_dies": ("import os; os._exit(3)", "the process that loaded it died"),
    "preload_threads": (
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "it leaves 1 threads running, which no forked process has",
    ),
    "preload_cuda": (
        "import torch; torch.cuda.is_initialized = lambda: True",
        "it initialises CUDA, which no forked process can use",
    ),
}
SHOWS = f"""
import pathlib, sys
print("preloaded", "whole" in sys.modules, [name for name in sys.modules if name in {[*BROKEN]}])
print("title", pathlib.Path("/proc/self/cmdline").read_text()[:5])
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_breaks_the_start_is_left_out_and_told(tmp_path: Path, name: str) -> None:
    source, why = BROKEN[name]
    (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "whole.py").touch()
    names = f"torch,{name},whole"
    with nodes(tmp_path, 1, SHOWS, NODES="", NODE_RANK="", PRELOAD=names, PYTHONPATH=str(tmp_path)) as job:
        # Beside the script such a file would be the script's own.
        job.script = tmp_path / "scripts" / "script.py"
        job.script.parent.mkdir()
        job.script.write_text(SHOWS)
        launcher = job.start(0, "2")
        assert launcher.end() == 5
    assert f"PRELOAD: left out {name}: {why}" in launcher.said
    assert "[rank 0] preloaded True []" in launcher.text
    assert "[rank 0] title rank0" in launcher.text
    report = json.loads(next(tmp_path.glob("node0/*/report/node0/report.json")).read_text())
    assert report["left_out"] == [f"{name}: {why}"]


def test_a_module_that_hangs_is_left_out_after_a_while_and_the_round_goes_on(tmp_path: Path) -> None:
    # Native code that keeps the GIL: no thread and no signal handler of Python would get a turn.
    (tmp_path / "hangs.py").write_text("import ctypes; ctypes.PyDLL(None).sleep(600)")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    left_out = list[tuple[str, str]]()
    preloaded = Preloaded(["torch", "hangs"], environ, lambda *words: left_out.append(words), limit=2)
    command = [sys.executable, "-P", str(AGENT), "--nnodes=1", "--nproc-per-node=1", "--node-rank=0"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", f"--log-dir={tmp_path}", "--tee=3"]
    (tmp_path / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    try:
        preloaded.start()
        engine = Torchrun([*command, str(WORKER), str(tmp_path / "script.py")], environ, preloaded=preloaded)
        assert asyncio.run(engine.watch(lambda: None)).code == 0
    finally:
        preloaded.stop()
    assert left_out == [("hangs", "it was not loaded within 2 s")]
    assert (tmp_path / "ran").exists()
    assert engine.moments.begun > engine.moments.launched


MARKS = """
import os, signal, sys, time
import torch, torch.distributed as dist
def reached(part):
    with open(os.environ["TORCHRUN_COMPOSE_MARKS"], "a") as file:
        file.write(f"{part} {time.time()}\\n")
dist.init_process_group("gloo")
reached("rendezvous")
time.sleep(0.1)
reached("checkpoint load")
dist.all_reduce(torch.ones(1))
reached("first step")
if "-1-" in os.environ["TORCHELASTIC_RUN_ID"]:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.5)
sys.exit(int(sys.argv[1]))
"""
PARTS = ["detection", "stop", "agreement", "fork", "rendezvous", "checkpoint load", "first step"]


def test_the_parts_of_a_restart_are_printed_once_and_are_in_the_report(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, MARKS, NODES="", NODE_RANK="", MAX_RESTARTS="1", LOGLEVEL="DEBUG") as job:
        launcher = job.start(0, "3")
        assert launcher.end() == 5
    (said,) = (line for line in launcher.said if "restarted in" in line)
    names = re.findall(r"[:,] ([a-z ]+) \d+\.\d\d", said.partition("restarted")[2])
    assert names == PARTS
    report = json.loads(next(tmp_path.glob("node0/*/report/node0/report.json")).read_text())
    (parts,) = report["restarts"]
    assert [*parts] == PARTS
    assert parts["checkpoint load"] >= 0.1
    killed = launcher.when("ended by SIGKILL")
    assert sum(parts.values()) < launcher.when("exit code 3") - killed + parts["detection"] + parts["stop"]


@pytest.mark.parametrize("text", ["import torch", "from torch import nn", "import torch.nn.functional as F"])
def test_ranks_that_train_a_copy_each_are_told_so_though_torch_was_loaded_before(tmp_path: Path, text: str) -> None:
    with nodes(tmp_path, 1, text, NODES="", NODE_RANK="", NPROC_PER_NODE="2") as job:
        launcher = job.start(0)
        assert launcher.end() == 0
    assert "its 2 ranks ran apart" in launcher.text


def test_a_file_beside_the_script_is_its_own_module_whatever_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "typing_extensions.py").touch()
    script = "import typing_extensions as own, sys; print('found', own.__file__, 'torch' in sys.modules)"
    with nodes(tmp_path, 1, script, NODES="", NODE_RANK="") as job:
        launcher = job.start(0)
        assert launcher.end() == 0
    assert f"found {tmp_path / 'typing_extensions.py'} False" in launcher.text


def test_another_python_for_the_script_is_started_as_torchrun_does(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    script = "import sys; print('found', sys.argv[1:], 'torch' in sys.modules)"
    with nodes(tmp_path, 1, script, NODES="", NODE_RANK="", PYTHON_EXEC=str(tmp_path / "python")) as job:
        launcher = job.start(0, "one")
        assert launcher.end() == 0
    assert "found ['one'] False" in launcher.text


def test_torch_compile_and_its_workers_serve_a_forked_script(tmp_path: Path) -> None:
    script = """
        import torch
        twice = torch.compile(lambda x: (x * 2).relu() + 1)
        print("compiled", twice(torch.tensor([-1.0, 1.0])).tolist())
    """
    with nodes(tmp_path, 1, dedent(script), NODES="", NODE_RANK="", TORCHINDUCTOR_COMPILE_THREADS="2") as job:
        launcher = job.start(0)
        assert launcher.end(120) == 0
    assert "compiled [1.0, 3.0]" in launcher.text
