"""How a plan is shown: lines for grep, a table for people, JSON for machines, five lines at the start."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.cli.explain import explain, sections, short, to_table
from app.config.problems import refusal
from app.config.settings import read_settings
from app.engine.command import command_line
from app.host.limits import Limits
from app.plan import Plan, draft, make_plan
from tests.machines.facts import drafted, host_of, settings_of
from tests.machines.library import MACHINES
from tests.unit.launch_facts import card, decide, given, machine, planned

PROJECT = Path(__file__).parents[2]
HOST = machine(card("eth0", "10.0.0.1/24"), card("eth1", "10.1.0.1/24"), limits=Limits(cpus=8))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(out: io.StringIO, **environ: str) -> tuple[int, str]:
    code = explain(draft(given(**environ), HOST), out=out)
    return code, out.getvalue()


def test_without_a_terminal_each_thing_is_one_line_with_name_value_source_and_reason() -> None:
    code, text = shown(io.StringIO(), NODES="10.0.0.1,10.0.0.2", NCCL_P2P_DISABLE="1")
    assert code == 0
    assert "\033" not in text
    for line in text.splitlines():
        assert re.match(r"[\w ]+=.* \([\w.: ]+\): .+|[\w ]+ rejected: .+|warning: .+", line), line
    assert "NODE_RANK=0 (detected): 10.0.0.1 on eth0 is entry 0 of NODES (counted from 0)" in text
    assert "interface rejected: eth1: 10.1.0.1 is not this node's address in NODES" in text


def test_a_terminal_gets_a_table_in_colour_with_the_same_words(tmp_path: Path) -> None:
    code, text = shown(Terminal(), NODES="10.0.0.1,10.0.0.2")
    assert code == 0
    assert "\033[1mNetwork\033[0m" in text
    table = to_table(drafted("dgx_h100", tmp_path), 100, colour=False)
    # A value is never broken, since people copy it; reasons are wrapped.
    assert max(len(line) for line in table.splitlines() if line.startswith("      ")) <= 100
    assert "not mlx5_bond_0:1" in table


def test_broken_settings_are_all_told_with_what_could_still_be_decided() -> None:
    code, text = shown(io.StringIO(), NODES="10.0.0.8,10.0.0.9", MASTER_PORT="x", NPROC_PER_NODE="gpu", BACKEND="gloo")
    assert code == 2
    assert text.count("problem: ") == 3
    assert "BACKEND=gloo (environment): as you set it" in text
    assert "NCCL_DEBUG=WARN" in text


def test_json_has_the_plan_the_decisions_and_what_is_wrong() -> None:
    out = io.StringIO()
    assert explain(draft(given(NODES="10.0.0.1,10.0.0.2"), HOST), as_json=True, out=out) == 0
    content = json.loads(out.getvalue())
    assert content["plan"]["nodes"]["rank"] == 0
    assert content["plan"]["script"]["env"]["GLOO_SOCKET_IFNAME"] == "eth0"
    assert {"name", "check", "value", "source", "reason", "rejected"} == content["decisions"][0].keys()
    out = io.StringIO()
    assert explain(draft(given(MASTER_PORT="x"), HOST), as_json=True, out=out) == 2
    assert json.loads(out.getvalue())["plan"] is None
    problem = json.loads(out.getvalue())["problems"][0]
    assert (problem["id"], problem["severity"], problem["check"]) == ("ports.not-a-number", "error", "ports")
    assert problem["setting"] == "MASTER_PORT"
    assert problem["values"] == {"given": "MASTER_PORT=x (environment)", "span": "from 1 to 65535"}


def test_the_start_prints_six_lines() -> None:
    lines = short(planned(HOST, NODES="10.0.0.1,10.0.0.2", NPROC_PER_NODE="2", NODERANK="1")).splitlines()
    assert lines == [
        "run default: node 0 of 2, 10.0.0.1 (detected)",
        "network: eth0, sockets only",
        "workers: 2 of 4 on the CPU, gloo",
        "script: -m app.train",
        "results: /runs/default",
        "store: 10.0.0.1 port 29400; 1 warning; run `explain` for details",
    ]


def test_the_command_of_torchrun_and_the_world_size_are_shown_as_they_will_be() -> None:
    environ = {"NODES": "10.0.0.9,10.0.0.1", "NPROC_PER_NODE": "2", "TRAIN_ARGS": "--name 'a b'"}
    found = {each.name: each for each in decide(HOST, **environ).decisions}
    assert (found["world size"].value, found["world size"].reason) == (
        "4",
        "2 nodes x 2 processes; ranks 2 to 3 are on this node",
    )
    plan = planned(HOST, **environ)
    command = command_line(
        plan,
        node_rank=1,
        nnodes=2,
        master_addr=plan.network.master_addr,
        master_port=plan.network.master_port,
        run_id="x",
    )
    shown = shlex.split(found["torchrun"].value)
    assert shown == [word for word in command if word in shown]
    assert shown[0] == "--nnodes=2"
    assert shown[-4:] == ["-m", "app.train", "--name", "a b"]


def test_every_setting_of_ours_stands_in_a_section_that_says_what_it_is_about() -> None:
    environ = {"DATA": "/d", "HARDWARE": "cpu", "HANG_TIMEOUT": "9", "MIN_NODES": "1", "STOP_GRACE_PERIOD": "60s"}
    last = dict(sections(decide(HOST, **environ)))["Other variables"]
    assert {each.name for each in last} <= {
        "NCCL_DEBUG",
        "NCCL_RAS_ADDR",
        "TORCH_FR_DUMP_TEMP_FILE",
        "PYTHONUNBUFFERED",
    }


def test_a_refusal_lists_every_problem_once() -> None:
    one = refusal(decide(HOST, MASTER_PORT="x").problems)
    assert (one.code, one.message) == (
        2,
        "MASTER_PORT=x (environment) is not a number. Write a whole number from 1 to 65535.",
    )
    two = refusal(decide(HOST, MASTER_PORT="x", NODE_RANK="y").problems)
    assert two.message.splitlines()[0] == "2 settings are wrong:"
    assert two.message.count("\n  - ") == 2


def test_a_value_cannot_forge_a_line() -> None:
    _, text = shown(io.StringIO(), TRAIN_ARGS="--x 'a\nwarning: forged\033[2J'")
    assert not [line for line in text.splitlines() if line.startswith("warning: forged")]
    assert "\033" not in text


def test_a_secret_of_the_users_file_is_handed_on_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WANDB_API_KEY=hunter2\nNCCL_IB_TC=106\n")
    settings = read_settings({}, tmp_path / ".env")
    plan = make_plan(settings, HOST)
    assert isinstance(plan, Plan)
    assert plan.script.env["WANDB_API_KEY"] == "hunter2"
    for as_json in (False, True):
        out = io.StringIO()
        explain(draft(settings, HOST), as_json=as_json, out=out)
        assert "106" in out.getvalue()
        assert "hunter2" not in out.getvalue() + repr(plan) + short(plan)


def explain_here(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, str(PROJECT / "entrypoint.py"), "explain"]
    environ = {**os.environ, "ENV_FILE": "", "NODES": "", "NODE_RANK": ""}
    # With bytecode, as in the image and as Python does by default.
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(command, cwd=PROJECT / "tests", env=environ, capture_output=True, text=True, timeout=60)


def test_explain_imports_nothing_heavy() -> None:
    imported = explain_here("-X", "importtime").stderr
    loaded = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert "app.plan" in loaded
    heavy = {"torch", "numpy", "docker", "rich", "asyncio", "urllib.request", "ssl"}
    assert not loaded & (heavy | {"psutil", "json", "platform", "_hashlib", "subprocess"})


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} {PROJECT / 'entrypoint.py'} explain | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_explain_takes_less_than_200_ms_of_cpu() -> None:
    # It waits for nothing, so its time on an idle machine is its CPU time, which holds on a busy one too.
    # Neighbours on the machine only ever add to it, so the shortest of many runs is the nearest to the truth.
    shortest = 1.0
    for _ in range(20):
        before = os.times()
        assert explain_here().returncode == 0
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        shortest = min(shortest, spent)
        if shortest < 0.2:
            return
    pytest.fail(f"explain takes {shortest:.2f} s of CPU")


def test_the_largest_machine_is_decided_in_milliseconds(tmp_path: Path) -> None:
    environ = MACHINES["dgx_h100"](tmp_path)
    start = time.process_time()
    assert host_of(settings_of(environ), tmp_path).rdma_ports
    assert time.process_time() - start < 0.2


def test_a_users_package_named_app_does_not_hide_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text("raise SystemExit('hidden')")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(PROJECT / "entrypoint.py"), "explain"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
