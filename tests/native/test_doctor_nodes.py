"""Doctors as processes on this machine: they meet over real sockets and end with a real all-reduce.

Unit tests cover what is concluded; only processes show that nobody waits for ever and that all end alike.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.launchers import PROJECT, Launcher, launch, nothing_left
from tests.native.ports import free_port

TOKEN = "0123456789abcdef" * 2


@pytest.fixture
def doctors(tmp_path: Path) -> Iterator["Doctors"]:
    made = Doctors(tmp_path)
    with nothing_left(tmp_path, made.started):
        yield made


class Doctors:
    """Doctors of one cluster on addresses of 127/8."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = str(free_port())
        self.started: list[Launcher] = []

    def start(self, rank: int, *words: str, nodes: int = 2, command: str = "doctor", **settings: str) -> Launcher:
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            "NODES": ",".join(f"127.0.0.{number + 1}" for number in range(nodes)),
            "NODE_RANK": str(rank),
            "NPROC_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "MASTER_PORT": self.port,
            "RUNS_ROOT": str(self.folder / f"node{rank}"),
            "TMPDIR": str(self.folder),
            **settings,
        }
        self.started.append(launch(self.folder, environment, command, *words))
        return self.started[-1]


def table(one: Launcher) -> list[str]:
    return re.findall(r"^(?:node [0-9?]|doctor:).*$", one.text, re.MULTILINE)


def bad(one: Launcher) -> list[str]:
    return [line for line in table(one) if " warn: " in line or " FAIL: " in line]


def test_two_doctors_meet_reduce_and_print_the_same_green_table(doctors: Doctors) -> None:
    both = [doctors.start(rank) for rank in (0, 1)]
    assert [one.end(60) for one in both] == [0, 0], both[0].text
    assert table(both[0]) == table(both[1])
    assert not bad(both[0])
    assert "all-reduce ok: gloo on 2 ranks" in both[0].text
    assert "through lo" in both[0].text
    # Each has a run folder of its own, although neither exists yet and both lie in one.
    assert "shared ok: each node has its own checkpoint folder" in both[0].text
    assert not list(doctors.folder.glob("**/.doctor-*"))


def test_one_node_alone_ends_within_two_seconds_and_never_loads_torch(doctors: Doctors) -> None:
    # In one process, so that the modules can be seen.
    code = (
        "import os, sys, time; start = time.monotonic(); sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from app.doctor.command import main\n"
        "import app.doctor.participant, app.doctor.collect.collective\n"
        "print(main(['--alone', '--json'], os.environ, Path('.env')), time.monotonic() - start, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(PROJECT)],
        env={"PATH": os.environ["PATH"], "NODES": "127.0.0.1,127.0.0.2", "NODE_RANK": "1", "RUNS_ROOT": "runs"},
        cwd=doctors.folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    code_, seconds, torch = done.stdout.splitlines()[-1].split()
    assert (code_, torch) == ("0", "False"), done.stdout + done.stderr
    assert float(seconds) < 2
    content = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert [node["rank"] for node in content["nodes"]] == [1]


def test_one_node_of_several_workers_reduces_by_itself(doctors: Doctors) -> None:
    one = doctors.start(0, nodes=1, NPROC_PER_NODE="2")
    assert one.end(60) == 0
    assert not bad(one)
    assert re.search(r"all-reduce ok: gloo on 2 ranks, [\d.]+ Gb/s bus bandwidth, inside this machine", one.text)


def test_json_alone_stands_on_standard_output(doctors: Doctors) -> None:
    done = subprocess.run(
        [sys.executable, str(PROJECT / "entrypoint.py"), "doctor", "--json"],
        env={"PATH": os.environ["PATH"], "MASTER_PORT": doctors.port, "NPROC_PER_NODE": "1"},
        cwd=doctors.folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["fit"] is True


def test_a_node_that_does_not_come_is_waited_for_by_name_and_ends_as_a_red_row(doctors: Doctors) -> None:
    one = doctors.start(0, "--wait", "4")
    assert one.end(30) == 1
    assert re.search(r"waiting \d+ s for node 1 \(127\.0\.0\.2\): connection refused", one.text)
    assert [line for line in bad(one) if line.startswith("node 1 (127.0.0.2): present FAIL: This node never came")]
    assert "node 0 (127.0.0.1): all-reduce -: not tried" in one.text


def test_a_taken_port_is_told_at_once_and_torchrun_is_not_tried_on_it(doctors: Doctors) -> None:
    with socket.create_server(("127.0.0.1", int(doctors.port))):
        both = [doctors.start(rank) for rank in (0, 1)]
        started = time.monotonic()
        assert [one.end(40) for one in both] == [1, 1]
    assert time.monotonic() - started < 30  # torchrun's own end took 45 s
    assert f"ports FAIL: MASTER_PORT {doctors.port} is taken on 127.0.0.1" in both[0].text
    assert "node 0 (127.0.0.1): all-reduce -: not tried" in both[0].text


def test_two_nodes_with_one_rank_are_told_to_both_and_on_node_0(doctors: Doctors) -> None:
    first, second, third = (doctors.start(rank, "--wait", "15", nodes=3) for rank in (0, 1, 1))
    codes = [one.end(40) for one in (first, second, third)]
    assert codes == [1, 1, 1]
    told = "Two nodes say they are node 1: 127.0.0.2 (host"
    assert told in first.text
    assert told in second.text + third.text
    assert "node 2 (127.0.0.3): present FAIL" in first.text


def test_another_token_is_refused_at_once_and_named_on_both_sides(doctors: Doctors) -> None:
    for name, text in (("a", TOKEN), ("b", TOKEN[::-1])):
        (doctors.folder / name).write_text(text)
    first = doctors.start(0, CLUSTER_TOKEN_FILE=str(doctors.folder / "a"))
    second = doctors.start(1, CLUSTER_TOKEN_FILE=str(doctors.folder / "b"))
    assert [first.end(30), second.end(30)] == [1, 1]
    assert "its CLUSTER_TOKEN_FILE is not that of node 0" in "\n".join(bad(first))
    assert "CLUSTER_TOKEN_FILE differs from that of node 0" in "\n".join(bad(second))


def test_a_node_that_is_killed_while_others_measure_is_a_red_row(doctors: Doctors) -> None:
    all_three = [doctors.start(rank, nodes=3) for rank in range(3)]
    all_three[2].wait_for("trying every pair")
    all_three[2].signal(signal.SIGKILL)
    assert [one.end(60) for one in all_three[:2]] == [1, 1]
    assert table(all_three[0]) == table(all_three[1])
    assert "node 2 (127.0.0.3): present FAIL: This node came and went away again" in all_three[0].text


def test_when_node_0_is_killed_the_others_end_and_say_so(doctors: Doctors) -> None:
    first, second = doctors.start(0), doctors.start(1)
    second.wait_for("trying every pair")
    first.signal(signal.SIGKILL)
    first.process.wait(10)
    assert second.end(40) == 1
    assert "node 0 (127.0.0.1): present FAIL: node 0 was lost" in second.text


def test_a_doctor_that_was_stopped_may_come_again_before_the_last_has_come(doctors: Doctors) -> None:
    others = [doctors.start(0, nodes=3)]
    early = doctors.start(1, nodes=3)
    others[0].wait_for(r"waiting \d+ s for node 2 \(127.0.0.3\)")
    early.signal(signal.SIGINT)
    early.process.wait(10)
    others += [doctors.start(rank, nodes=3) for rank in (1, 2)]
    assert [one.end(60) for one in others] == [0, 0, 0], others[0].text


def test_sigterm_while_waiting_ends_it_at_once(doctors: Doctors) -> None:
    one = doctors.start(1)
    one.wait_for(r"waiting \d+ s for node 0")
    started = time.monotonic()
    one.signal(signal.SIGTERM)
    assert one.end(10) == 143
    assert time.monotonic() - started < 3
    assert "Traceback" not in one.text


def test_a_node_that_waits_to_train_is_left_alone_and_trains_after_doctor(doctors: Doctors) -> None:
    script = doctors.folder / "script.py"
    script.write_text("print('trained', flush=True)\n")
    training = doctors.start(1, str(script), command="run")
    with contextlib.suppress(AssertionError):
        training.wait_for("waiting", 5)
    doctor = doctors.start(0, "--wait", "4")
    assert doctor.end(30) == 1
    node_0 = doctors.start(0, str(script), command="run")
    assert [node_0.end(60), training.end(60)] == [0, 0], training.text
    assert "trained" in training.text
