"""What is told of a job: settings, figures, the dashboard, texts. tests/native/test_monitoring.py: real launchers."""

import json
import re
import time
from pathlib import Path

import pytest

from app.cli.explain import to_json
from app.config.redaction import REMOVED, redact, settings_secrets
from app.gang.connection import Message
from app.gang.membership import NodeConnection
from app.host.accelerators import amd, read_loads
from app.host.accelerators.gpu import Gpu, GpuLoad, Gpus
from app.host.accelerators.nvidia_health import read_load
from app.report.redaction import plan_secrets
from app.supervise import stacks, status
from app.supervise.notify import message, scheme
from app.supervise.progress import Gained, read_figures
from app.supervise.prometheus import FIGURES, PREFIX, samples
from app.supervise.traffic import count_bytes
from tests.unit.launch_facts import decide, given, machine, planned, problem_ids

DOCS = Path(__file__).resolve().parents[2] / "docs"
SERVICES = "slack://one/two/three, mailto://me:word@example.org?to=a@b.org,c@d.org ntfys://topic-name"
RECORD = {
    "run": "big",
    "node": 1,
    "nodes": 3,
    "address": "10.0.0.2",
    "state": "running",
    "round": 2,
    "ranks": [2, 3],
    "restarts": {"lost": 1},
    "hang": "",
    "events": [[990.0, "restarting", "node 2 was lost"]],
    "heartbeats": {"0": 0.0004, "1": -1.0, "2": None},
    "progress": "step 7",
    "progress_time": 980.0,
    "figures": {"step": 7.0, "loss": 1.5},
    "bytes": {"eth0": [10, 20]},
    "bytes_per_second": {"eth0": [1e6, 2e6]},
    "started": 900.0,
    "time": 1000.0,
    "gpus": [{"index": 0, "busy": 0.5, "used": 10**9, "total": 8 * 10**9, "temperature": 61}],
    "last_words": "at step 7",
}


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("9400", ("127.0.0.1", 9400)),
        ("0.0.0.0:9400", ("0.0.0.0", 9400)),
        ("[::]:9400", ("::", 9400)),
    ],
)
def test_figures_are_for_this_machine_alone_unless_an_address_is_given(text: str, means: tuple[str, int]) -> None:
    assert planned(machine(), METRICS_PORT=text).monitoring.metrics == means


@pytest.mark.parametrize("text", ["0", "70000", "x", "10.0.0.1:", "host"])
def test_a_listener_without_a_port_is_refused(text: str) -> None:
    assert problem_ids(machine(), METRICS_PORT=text) == ["ports.not-a-listener"]


def test_services_may_have_commas_of_their_own() -> None:
    assert planned(machine(), NOTIFY=SERVICES).monitoring.notify == (
        "slack://one/two/three",
        "mailto://me:word@example.org?to=a@b.org,c@d.org",
        "ntfys://topic-name",
    )


def test_what_is_no_service_is_refused_without_being_shown() -> None:
    found = decide(machine(), NOTIFY="hooks.example.org/secret-word").problems
    assert [each.id for each in found] == ["settings.not-services"]
    assert "secret-word" not in found[0].message + json.dumps(found[0].to_dict())


def test_nothing_shows_the_services_and_the_script_does_not_get_them() -> None:
    settings = given(NOTIFY=SERVICES)
    found = decide(machine(), NOTIFY=SERVICES)
    assert found.plan is not None
    shown = to_json(found) + repr(found.plan)
    assert not re.search("two/three|word@|topic-name", shown)
    assert "NOTIFY" in found.plan.script.removed
    assert "NOTIFY" not in found.plan.script.env
    for secrets in (settings_secrets(settings), plan_secrets(found.plan, {})):
        assert redact("to slack://one/two/three it went", secrets) == f"to {REMOVED} it went"
    assert scheme("slack://one/two/three") == "slack"


def test_services_in_secrets_env_are_not_handed_to_the_script_either(tmp_path: Path) -> None:
    from app.config.settings import read_settings
    from app.plan import draft

    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/env").write_text(f"NOTIFY={SERVICES}\n")
    found = draft(read_settings({}, tmp_path / ".env"), machine())
    assert found.plan is not None
    assert len(found.plan.monitoring.notify) == 3
    assert "NOTIFY" not in found.plan.script.env


def test_a_message_says_what_where_and_how_to_look_closer() -> None:
    plan = planned(machine(), RUN_NAME="big")
    told = message(plan, "restarting", "node 1 failed").splitlines()
    assert told[0] == "node 1 failed"
    assert "node 0 of 1" in told[1]
    assert "run big" in told[1]
    assert "report" in told[2]
    assert "results: " in message(plan, "finished", "done")


def test_prometheus_gets_every_figure_that_is_known() -> None:
    loads = (GpuLoad(index=0, busy=0.5, used=1, total=2, temperature=None),)
    found = {(name, *labels.values()): value for name, labels, value in samples(RECORD, loads, 1000.0)}
    assert found["progress_age_seconds",] == 20
    assert (found["restarts", "lost"], found["restarts", "worker"]) == (1, 0)
    assert (found["node_connected", "0"], found["node_connected", "2"]) == (1, 0)
    assert found["heartbeat_round_trip_seconds", "0"] == 0.0004
    assert ("heartbeat_round_trip_seconds", "1") not in found
    assert found["gpu_busy_ratio", "0"] == 0.5
    assert ("gpu_temperature_celsius", "0") not in found
    assert (found["network_received_bytes", "eth0"], found["loss",]) == (10, 1.5)
    assert {name for name, *_ in found} < FIGURES.keys()
    assert [*samples({}, (), 0.0)] == [("up", {}, 1)]


def test_the_dashboard_and_the_page_name_the_figures_that_are_exported() -> None:
    exported = {PREFIX + name + "_total" * (kind == "counter") for name, (kind, _) in FIGURES.items()}
    board = json.loads((DOCS / "grafana.json").read_text())
    named = set(re.findall(rf"{PREFIX}\w+", json.dumps(board)))
    assert named == exported
    assert set(re.findall(rf"{PREFIX}\w+", (DOCS / "monitoring.md").read_text())) == exported
    assert len({each["id"] for each in board["panels"]}) == len(board["panels"])


def test_the_newest_figures_of_a_script_are_read_from_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_figures(file) == {}
    lines = [{"step": 1, "loss": 3.0, "tokens_per_second": 9}, {"step": 2, "loss": float("nan"), "lr": 1}, {"step": 3}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '[]\n{"step": 4, "lo')
    assert read_figures(file) == {"step": 3, "loss": 3.0, "tokens_per_second": 9}


def test_the_time_of_progress_is_that_of_its_last_change(tmp_path: Path) -> None:
    gained, progress = Gained(), tmp_path / "progress"
    gained.read(tmp_path, tmp_path / "checkpoints")
    assert gained.time == 0
    progress.write_text("step 1")
    gained.read(tmp_path, tmp_path / "checkpoints")
    first = gained.time
    assert abs(first - time.time()) < 60
    gained.read(tmp_path, tmp_path / "checkpoints")
    assert gained.time == first


def test_last_words_are_the_last_line_of_the_newest_log_without_secrets(tmp_path: Path) -> None:
    assert status.last_words({"logs": str(tmp_path)}) == ""
    for number, text in enumerate(["old\n", "x" * 9000 + "\nnew token=hf_abcdefghijklmnopqrst\n \n", ""]):
        folder = tmp_path / f"default-{number}/attempt_0/0"
        folder.mkdir(parents=True)
        (folder / "stdout.log").write_text(text)
    assert status.last_words({"logs": str(tmp_path)}) == f"new token={REMOVED}"


def test_status_for_people_leaves_out_what_is_not_known() -> None:
    text = status.to_text([RECORD])
    for told in ("big: node 1 of 3", "restarts: 1 (lost)", "node 0 0.4 ms", "node 2 not connected", "50% busy", "61 C"):
        assert told in text
    assert "hang" not in text
    assert status.to_text([]) == "no launcher is running"
    bare = {**RECORD, "gpus": [dict.fromkeys(("busy", "used", "total", "temperature"), None) | {"index": 0}]}
    assert "does not tell" in status.to_text([bare])


def test_ranks_with_the_same_stacks_are_told_together() -> None:
    entered = [{"name": "all_reduce", "sequence": 6, "done": False}]
    same = {"at": "train.py:9, in step", "entered": entered, "threads": [{"name": "MainThread", "stack": "  File x\n"}]}
    found = [{"rank": 0, **same}, {"rank": 1, "why": stacks.NO_ANSWER}, {"rank": 2, **same}]
    text = stacks.to_text(found)
    assert "ranks 0, 2 at train.py:9, in step; in all_reduce #6" in text
    assert f"rank 1 {stacks.NO_ANSWER}" in text
    assert stacks.to_text([]) == "no launcher is running"


def test_the_loads_of_gpus_are_read_where_they_are_told(tmp_path: Path) -> None:
    told = "0, 97, 1024, 81559, 64\n1, [N/A], [N/A], [N/A], 50\nnonsense\n"
    assert read_load(told) == (
        GpuLoad(index=0, busy=0.97, used=1 << 30, total=81559 << 20, temperature=64),
        GpuLoad(index=1, busy=None, used=None, total=None, temperature=50),
    )
    folder = tmp_path / "sys/class/drm/renderD128/device"
    (folder / "hwmon/hwmon3").mkdir(parents=True)
    for name, content in (
        ("gpu_busy_percent", "40"),
        ("mem_info_vram_used", "5"),
        ("hwmon/hwmon3/temp1_input", "61000"),
    ):
        (folder / name).write_text(content)
    gpus = Gpus(vendor="AMD", visible=(Gpu(index=0, render="renderD128"),))
    assert amd.loads(tmp_path, gpus) == (GpuLoad(index=0, busy=0.4, used=5, total=None, temperature=61),)
    assert read_loads(tmp_path) == ()


def test_bytes_are_counted_for_the_card_and_for_rdma_ports_that_count(tmp_path: Path) -> None:
    counters = {
        "net/eth0/statistics/rx_bytes": 1,
        "net/eth0/statistics/tx_bytes": 2,
        "infiniband/mlx5_0/ports/1/counters/port_rcv_data": 3,
        "infiniband/mlx5_0/ports/1/counters/port_xmit_data": 0,
        "infiniband/mlx5_1/ports/1/state": 4,
    }
    for name, value in counters.items():
        file = tmp_path / "sys/class" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(value))
    assert count_bytes("eth0", tmp_path) == {"eth0": (1, 2), "mlx5_0:1": (12, 0)}


def test_a_heartbeat_is_echoed_with_the_time_that_it_lay_at_node_0() -> None:
    node = NodeConnection(connection=None, hello=None, heard=10.0)  # type: ignore[arg-type]
    assert node.echo(11.0) == {}
    node.at = 500
    echo: Message = node.echo(11.5)
    assert echo == {"at": 500, "held": 1_500_000}
