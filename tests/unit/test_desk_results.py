"""What the nodes send to the desk: differences of plans, one verdict, files that go on where they stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.config.errors import UserError
from app.fleet.check import checked
from app.fleet.hosts import Host
from app.fleet.remote import Result
from app.fleet.results import SENDER, Receiver, present, safe, verdict
from app.fleet.stack import exports
from app.fleet.together import differences
from tests.unit.test_desk_hosts import desk

A, B = Host(name="gpu-a", rank=0), Host(name="gpu-b", rank=1)


def plan(*decisions: tuple[str, str], **texts: list[dict[str, str]]) -> dict[str, Any]:
    told = [{"name": name, "value": value} for name, value in decisions]
    return {"decisions": told, "warnings": [], "problems": [], **texts}


def test_explain_shows_what_differs_and_who_warns() -> None:
    warning = {"message": "slow"}
    plans = {A: plan(("X", "1"), ("Y", "1"), warnings=[warning]), B: plan(("X", "1"), ("Y", "2"), warnings=[warning])}
    lines = differences(plans)
    assert [line.split() for line in lines[:2]] == [["gpu-a", "gpu-b"], ["Y", "1", "2"]]
    assert lines[-1] == "warning (gpu-a, gpu-b): slow"
    assert any(line.startswith("X") for line in differences(plans, everything=True))


def node_report(**fields: object) -> dict[str, Any]:
    return {"time": 100.0, "verdict": "v", "cause": "", "fix": "", "names_cause": False, "node_rank": 0, **fields}


def test_the_one_verdict_is_that_of_the_node_that_knows_the_cause() -> None:
    reports = {
        "gpu-a": node_report(),
        "gpu-b": node_report(verdict="rank 1 failed", cause="no memory", fix="buy some", names_cause=True, node_rank=1),
        "gpu-c": node_report(time=1.0, verdict="of last week", names_cause=True, cause="x", node_rank=2),
    }
    lines = verdict(reports)
    assert lines[:3] == ["verdict: rank 1 failed", "cause: no memory", "fix: buy some"]
    assert "gpu-c" in lines[-1]
    assert verdict({}) != []


@pytest.mark.parametrize(
    ("name", "fine"),
    [("a/b.txt", True), ("../x", False), ("/etc/passwd", False), ("a/../../x", False), ("a\nb", False), ("", False)],
)
def test_a_node_cannot_name_a_file_outside_of_its_folder(name: str, fine: bool) -> None:
    assert safe(name) is fine


def sent(run_dir: Path, here: Path, *patterns: str) -> bytes:
    """What the program in the node's container answers to this desk."""
    request = json.dumps({"patterns": patterns, "have": present(here)})
    environment = {**os.environ, "RUN_DIR": str(run_dir), "CHECKPOINT_DIR": ""}
    done = subprocess.run([sys.executable, "-c", SENDER], input=request.encode(), env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pull_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    (there / "checkpoints/step-1").mkdir(parents=True)
    (there / "checkpoints/empty").touch()
    (there / "checkpoints/step-1/weights").write_bytes(bytes(range(256)) * 40)
    (there / "metrics.jsonl").write_text("{}\n")
    stream = sent(there, here, "checkpoints")
    receiver = Receiver(here)
    for at in range(0, len(stream) - 5000, 37):
        receiver.feed(stream[at : min(at + 37, len(stream) - 5000)])
    receiver.close()
    assert not (here / "checkpoints/step-1/weights").exists()
    rest = sent(there, here, "checkpoints", "*.jsonl")
    assert len(rest) < 5400
    receiver = Receiver(here)
    receiver.feed(rest)
    assert (here / "checkpoints/step-1/weights").read_bytes() == bytes(range(256)) * 40
    assert sorted(file.name for file in here.rglob("*") if file.is_file()) == ["empty", "metrics.jsonl", "weights"]
    assert sent(there, here, "checkpoints", "*.jsonl") == b""
    # A file that was written anew meanwhile begins anew.
    (there / "metrics.jsonl").write_text("{}\n{}\n")
    assert b'"start": 0' in sent(there, here, "*.jsonl")


def test_a_file_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    head = json.dumps({"path": "../../x", "size": 1, "mtime": 1, "start": 0}).encode()
    with pytest.raises(UserError):
        Receiver(tmp_path).feed(head + b"\nx")


def test_this_shells_settings_reach_the_hosts_and_its_own_rank_does_not(tmp_path: Path) -> None:
    made = desk(tmp_path, "NODES=a,b\nWORKSPACE=/home/me/mine\nTRAIN_ARGS=--lr 1")
    environ = {"TRAIN_LR": "2", "NCCL_DEBUG": "INFO", "NODE_RANK": "1", "HOME": "/root"}
    assert exports(made, B, environ) == {"TRAIN_LR": "2", "NCCL_DEBUG": "INFO", "WORKSPACE": "./workspace"}
    assert exports(desk(tmp_path, "HOSTS=a,b\nNNODES=2\nMASTER_ADDR=10.0.0.1"), B, {}) == {"NODE_RANK": "1"}


FINE = {
    "time": (0, "1000.25"),
    "arch": (0, "x86_64"),
    "docker": (0, "26.1.5"),
    "compose": (0, "2.26.1"),
    "runtimes": (0, "io.containerd.runc.v2 runc"),
    "gpus": (127, "sh: 1: nvidia-smi: not found"),
    "disk": (0, "Filesystem 1024-blocks Used Available Capacity Mounted on;/dev/sda 9 9 90000000 1% /"),
    "image": (0, "sha256:0123456789abcdef amd64"),
}


@pytest.mark.parametrize(
    ("said", "settings", "ids"),
    [
        ({}, "", []),
        (
            {"docker": (127, "sh: 1: docker: not found"), "compose": (127, "sh: 1: docker: not found")},
            "",
            ["docker.missing"],
        ),
        ({"compose": (0, "2.20.2")}, "", ["check.compose-old"]),
        ({"compose": (1, "docker: 'compose' is not a docker command.")}, "", ["compose.missing"]),
        ({"time": (0, "900.0")}, "", ["check.clock"]),
        ({"disk": (0, "/dev/sda 9 9 1000000 99% /")}, "", ["check.disk-low"]),
        ({"image": (0, "sha256:0123 arm64")}, "", ["check.other-arch"]),
        ({}, "HARDWARE=nvidia", ["check.no-toolkit"]),
        ({"runtimes": (0, "nvidia runc"), "gpus": (0, "H100;H100")}, "HARDWARE=nvidia", []),
    ],
)
def test_check_names_what_a_host_lacks(
    tmp_path: Path, said: dict[str, tuple[int, str]], settings: str, ids: list[str]
) -> None:
    out = "".join(f"{name}\t{code}\t{text}\n" for name, (code, text) in {**FINE, **said}.items()).encode()
    result = Result(host=B, code=0, out=out, err="", seconds=0.5, began=1000.0)
    row = checked(desk(tmp_path, f"NODES=a,b\n{settings}"), result)
    assert [each.id for each in row.problems] == ids
    assert all("gpu-b" in each.message for each in row.problems)
