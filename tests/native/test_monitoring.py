"""A job that is watched: status, stacks, figures for Prometheus, and one message for each event, by real launchers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.supervise.prometheus import FIGURES, PREFIX
from tests.native.launchers import ALL_REDUCE, ONE_FAILS, PROJECT, Nodes, nodes
from tests.native.ports import free_port

TRAINS = """
import json, os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
for step in range(1, 100000):
    dist.all_reduce(torch.ones(1))
    if rank == 0:
        with open(os.environ["RUN_DIR"] + "/metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / step, "tokens_per_second": 50.0}) + "\\n")
        with open(os.environ["RUN_DIR"] + "/progress", "w") as file:
            file.write(f"step {step}\\n")
    print("at step", step, flush=True)
    time.sleep(0.1)
"""
FAILS_ONCE = """
import os, pathlib, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
print("trains", flush=True)
marker = pathlib.Path(os.environ["RUN_DIR"], "failed")
if dist.get_rank() == 1 and not marker.exists():
    marker.write_text("")
    raise ValueError("bad batch, with token=hf_abcdefghijklmnopqrstuvwxyz")
dist.all_reduce(torch.ones(1))
"""
HANGS = """
import sys, time, torch, torch.distributed as dist

def load_batch():
    time.sleep(float(sys.argv[1]))

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
print("trains", flush=True)
if dist.get_rank() == 1:
    load_batch()
dist.all_reduce(torch.ones(1))
"""
HOLDS_THE_GIL = """
import ctypes, os, sys, torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    print("holds the GIL", flush=True)
    ctypes.PyDLL(None).open(os.fsencode(sys.argv[1]), os.O_RDONLY)
dist.barrier()
"""


WAITS = "import time\nprint('waits', flush=True)\ntime.sleep(600)\n"


@dataclass
class Sink:
    """A service that takes messages."""

    port: int
    messages: list[dict[str, str]] = field(default_factory=list)
    news: threading.Condition = field(default_factory=threading.Condition)

    @property
    def service(self) -> str:
        return f"json://127.0.0.1:{self.port}/secret-path"

    def kinds(self) -> list[str]:
        """What the run did, message by message."""
        return [each["title"].partition("default ")[2] for each in self.messages]

    def wait_for(self, *kinds: str, seconds: float = 60) -> None:
        """Until these messages are here, in any order; fails after `seconds`, and at once for one too many."""
        until = time.monotonic() + seconds
        with self.news:
            while sorted(self.kinds()) != sorted(kinds):
                left = until - time.monotonic()
                assert left > 0, self.messages
                assert len(self.messages) <= len(kinds), self.messages
                self.news.wait(left)


@pytest.fixture
def sink() -> Iterator[Sink]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with taken.news:
                taken.messages.append(content)
                taken.news.notify_all()
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    taken = Sink(server.server_port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield taken
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def watched(folder: Path, count: int, script: str, **settings: str) -> Iterator[Nodes]:
    """Nodes whose launchers are the only ones that `ask` sees."""
    (folder / "tmp").mkdir()
    with nodes(folder, count, script, TMPDIR=str(folder / "tmp"), HEARTBEAT_TIMEOUT="2", **settings) as made:
        yield made


def ask(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROJECT / "entrypoint.py"), *words],
        env={"PATH": os.environ["PATH"], "TMPDIR": str(folder / "tmp"), **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )


def status(folder: Path, ready: Callable[[dict[int, Any]], object]) -> dict[int, Any]:
    """What `status --json` tells by node, once it is `ready`."""
    until = time.monotonic() + 60
    while True:
        found = {each["node"]: each for each in json.loads(ask(folder, "status", "--json").stdout)}
        if ready(found):
            return found
        assert time.monotonic() < until, found


def test_status_tells_of_the_gang_the_script_and_the_machine(tmp_path: Path) -> None:
    with watched(tmp_path, 2, TRAINS, NPROC_PER_NODE="2") as made:
        before = ask(tmp_path, "status")
        assert (before.returncode, before.stdout) == (1, "no launcher is running\n")
        first, second = made.start_all()
        first.wait_for("at step 5")
        second.workers()[0].kill()
        first.wait_for("round 2: node rank")

        def ready(found: dict[int, Any]) -> bool:
            known = found.get(0, {}).get("heartbeats", {})
            return found[0]["round"] == 2 and len(known) == 2 and all(trip and trip > 0 for trip in known.values())

        found = status(tmp_path, lambda found: ready(found) and found[0]["bytes_per_second"] and found[1]["last_words"])
        for node, ranks in ((0, [0, 1]), (1, [2, 3])):
            assert (found[node]["state"], found[node]["round"]) == ("running", 2)
            assert (found[node]["run"], found[node]["nodes"], found[node]["ranks"]) == ("default", 2, ranks)
            assert found[node]["restarts"] == {"worker": 1}
            assert "at step" in found[node]["last_words"]
            assert [kind for _, kind, _ in found[node]["events"]] == ["started", "restarting"]
        assert found[0]["figures"]["tokens_per_second"] == 50
        assert found[0]["figures"]["step"] >= 1
        assert found[0]["progress"].startswith("step ")
        assert 0 < found[1]["heartbeats"]["0"] < 2
        assert found[0]["bytes_per_second"]["lo"][0] > 0
        text = ask(tmp_path, "status").stdout
        assert "restarts: 1 (worker)" in text
        assert "default: node 1 of 2" in text
        first.signal(signal.SIGTERM)
        assert [launcher.end() for launcher in made.launchers] == [143, 143]


def test_stacks_show_where_every_rank_is_and_stop_nothing(tmp_path: Path) -> None:
    with watched(tmp_path, 2, HANGS, HANG_REPORT="0") as made:
        first, second = made.start_all("8")
        for launcher in (first, second):
            launcher.wait_for("trains")
        # The last collective may just have been entered.
        until = time.monotonic() + 10
        while "load_batch" not in (asked := ask(tmp_path, "stacks", "--json")).stdout:
            assert time.monotonic() < until
        assert asked.returncode == 0
        found = {each["rank"]: each for each in json.loads(asked.stdout)}
        assert "in load_batch: time.sleep" in found[1]["at"]
        assert found[1]["threads"][0]["name"] == "MainThread"
        assert "all_reduce" in found[0]["at"]
        assert found[0]["entered"][-1]["name"] == "all_reduce"
        text = ask(tmp_path, "stacks").stdout
        assert "rank 0 at script.py:12" in text
        assert "load_batch" in text
        assert [first.end(), second.end()] == [0, 0]


def test_stacks_of_a_single_process_are_told_too(tmp_path: Path) -> None:
    with watched(tmp_path, 1, WAITS, NODES="", NODE_RANK="") as made:
        launcher = made.start(0)
        launcher.wait_for("waits")
        assert [each["at"] for each in json.loads(ask(tmp_path, "stacks", "--json").stdout)] == [
            "script.py:3, in <module>: time.sleep(600)"
        ]
        launcher.signal(signal.SIGTERM)
        assert launcher.end() == 143


def test_a_rank_whose_gil_is_held_is_named_and_the_others_answer(tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    with watched(tmp_path, 2, HOLDS_THE_GIL) as made:
        _, second = made.start_all(str(held))
        second.wait_for("holds the GIL")
        asked = ask(tmp_path, "stacks", "--json")
        found = {each["rank"]: each for each in json.loads(asked.stdout)}
        assert asked.returncode == 1
        assert "GIL" in found[1]["why"]
        assert "barrier" in found[0]["at"]
        held.open("w").close()
        assert [launcher.end() for launcher in made.launchers] == [0, 0]


def test_prometheus_gets_what_is_known_of_each_node(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    port = free_port()
    with watched(tmp_path, 2, TRAINS, METRICS_PORT=str(port)) as made:
        first, second = made.start(0), made.start(1, METRICS_PORT="")
        first.wait_for("at step 3")
        second.workers()[0].kill()
        first.wait_for("round 2: node rank")
        until, values = time.monotonic() + 30, dict[tuple[str, str], float]()
        while values.get((f"{PREFIX}round", "")) != 2 or (f"{PREFIX}heartbeat_round_trip_seconds", "1") not in values:
            assert time.monotonic() < until, values
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            families = [*parser.text_string_to_metric_families(text)]
            samples = [sample for family in families for sample in family.samples]
            assert all((sample.labels["run"], sample.labels["node"]) == ("default", "0") for sample in samples)
            names = ("cause", "peer", "device", "gpu")
            values = {
                (sample.name, next((sample.labels[name] for name in names if name in sample.labels), "")): sample.value
                for sample in samples
            }
        for family in families:
            assert family.type == FIGURES[family.name.removeprefix(PREFIX)][0]
        assert values[f"{PREFIX}up", ""] == 1
        assert values[f"{PREFIX}restarts_total", "worker"] == 1
        assert values[f"{PREFIX}restarts_total", "lost"] == 0
        assert values[f"{PREFIX}node_connected", "1"] == 1
        assert values[f"{PREFIX}tokens_per_second", ""] == 50
        assert 0 <= values[f"{PREFIX}progress_age_seconds", ""] < 60
        first.signal(signal.SIGTERM)
        assert [launcher.end() for launcher in made.launchers] == [143, 143]


def test_a_port_for_prometheus_that_is_taken_costs_the_job_nothing(tmp_path: Path, sink: Sink) -> None:
    with watched(tmp_path, 1, ALL_REDUCE, NODES="", NODE_RANK="", METRICS_PORT=str(sink.port)) as made:
        launcher = made.start(0, "5")
        assert launcher.end() == 0
        assert f"127.0.0.1 port {sink.port} (METRICS_PORT)" in launcher.text


STARTED, AGAIN, HANG, LOST = "started", "failed, starts again", "hangs", "lost a node"
FINISHED, STOPPED, FAILED = "finished", "was stopped", "failed"


def test_a_job_that_fails_once_is_told_of_three_times_without_its_secrets(tmp_path: Path, sink: Sink) -> None:
    with watched(tmp_path, 2, FAILS_ONCE, NOTIFY=sink.service) as made:
        launchers = made.start_all()
        assert [launcher.end() for launcher in launchers] == [0, 0]
        assert sink.kinds() == [STARTED, AGAIN, FINISHED]
        bodies = [each["message"] for each in sink.messages]
        assert "2 nodes" in bodies[0]
        assert "node 1 (127.0.0.2) - rank 1 failed with ValueError: bad batch" in bodies[1]
        assert "told by node 0 of 2 (127.0.0.1) of run default" in bodies[1]
        assert "hf_abcdef" not in str(bodies)
        assert all("secret-path" not in launcher.text for launcher in launchers)


def test_a_job_without_restarts_left_is_told_of_once(tmp_path: Path, sink: Sink) -> None:
    with watched(tmp_path, 2, ONE_FAILS, NOTIFY=sink.service, MAX_RESTARTS="0") as made:
        assert [launcher.end() for launcher in made.start_all()] == [5, 5]
        assert sink.kinds() == [STARTED, FAILED]


def test_a_hang_is_told_once_and_its_restart_once(tmp_path: Path, sink: Sink) -> None:
    settings = {"HANG_REPORT": "2", "HANG_TIMEOUT": "4", "MAX_RESTARTS": "1"}
    with watched(tmp_path, 2, HANGS, NOTIFY=sink.service, **settings) as made:
        made.start_all("600")
        sink.wait_for(STARTED, HANG, AGAIN, HANG, FAILED)
        assert [launcher.end() for launcher in made.launchers] == [5, 5]


def test_a_stop_is_told_once(tmp_path: Path, sink: Sink) -> None:
    with watched(tmp_path, 2, TRAINS, NOTIFY=sink.service) as made:
        first, second = made.start_all()
        first.wait_for("at step 2")
        second.signal(signal.SIGTERM)
        assert [first.end(), second.end()] == [143, 143]
        assert sink.kinds() == [STARTED, STOPPED]


def test_a_lost_node_that_comes_back_is_told_once(tmp_path: Path, sink: Sink) -> None:
    with watched(tmp_path, 2, TRAINS, NOTIFY=sink.service) as made:
        first, second = made.start_all()
        first.wait_for("at step 2")
        second.process.kill()
        sink.wait_for(STARTED, LOST)
        made.start(1)
        first.wait_for("round 2: node rank")
        first.signal(signal.SIGTERM)
        assert first.end() == 143
        sink.wait_for(STARTED, LOST, STOPPED)


def test_a_lost_node_0_that_comes_back_tells_so_itself_once(tmp_path: Path, sink: Sink) -> None:
    with watched(tmp_path, 3, TRAINS, NOTIFY=sink.service) as made:
        first, second, _ = made.start_all()
        first.wait_for("at step 2")
        first.process.kill()
        second.wait_for("node 0 .* was lost")
        again = made.start(0)
        again.wait_for("at step 2")
        sink.wait_for(STARTED, LOST)
        again.signal(signal.SIGTERM)
        assert again.end() == 143
        sink.wait_for(STARTED, LOST, STOPPED)


def test_a_lost_node_0_is_told_by_node_1_and_not_again_when_it_comes_back(tmp_path: Path, sink: Sink) -> None:
    with watched(tmp_path, 3, TRAINS, NOTIFY=sink.service) as made:
        first, _, _ = made.start_all()
        first.wait_for("at step 2")
        first.process.kill()
        sink.wait_for(STARTED, LOST)
        assert "told by node 1 of 3" in sink.messages[1]["message"]
        again = made.start(0)
        again.wait_for("at step 2")
        again.signal(signal.SIGTERM)
        assert again.end() == 143
        sink.wait_for(STARTED, LOST, STOPPED)


@pytest.mark.parametrize("lost", [1, 2])
def test_who_is_left_tells_that_node_0_never_came_back(lost: int, tmp_path: Path, sink: Sink) -> None:
    """With node 0 alone, and together with node 1, which would have spoken for it."""
    with watched(tmp_path, 3, TRAINS, NOTIFY=sink.service, REJOIN_TIMEOUT="6") as made:
        launchers = made.start_all()
        launchers[0].wait_for("at step 2")
        for launcher in launchers[:lost]:
            launcher.process.kill()
        sink.wait_for(STARTED, LOST, FAILED)
        assert [launcher.end() for launcher in launchers[lost:]] == [6] * (3 - lost)
        assert sink.kinds() == [STARTED, LOST, FAILED]
        assert all(f"told by node {lost} of 3" in each["message"] for each in sink.messages[1:])


def test_services_that_are_dead_or_unknown_cost_the_job_nothing(tmp_path: Path, sink: Sink) -> None:
    services = f"json://127.0.0.1:{free_port()}/dead-secret, nonsense://secret-word, {sink.service}"
    with watched(tmp_path, 2, ALL_REDUCE, NOTIFY=services) as made:
        assert [launcher.end() for launcher in made.start_all("10")] == [0, 0]
        assert sink.kinds() == [STARTED, FINISHED]
        text = made.launchers[0].text
        assert "no message to json (NOTIFY): it did not take the message" in text
        assert "no message to nonsense (NOTIFY): Apprise does not understand its address" in text
        assert "secret" not in text


def test_services_are_tried_without_a_job(tmp_path: Path, sink: Sink) -> None:
    asked = ask(tmp_path, "notify", "--test", NOTIFY=f"{sink.service},json://127.0.0.1:{free_port()}/dead-secret")
    assert (asked.returncode, sink.kinds()) == (1, ["sends its messages here"])
    assert "service 1 (json): took the message" in asked.stdout
    assert "service 2 (json): it did not take the message" in asked.stdout
    assert "secret" not in asked.stdout + asked.stderr
