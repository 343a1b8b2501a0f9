"""A user's mistake ends in one clear message and exit code 2, before anything starts."""

from __future__ import annotations

import os
import re
import time

import pytest

from tests.testbed import BedError, Cluster

OWN = "10.77.{number}.11"
OTHER = "10.77.{number}.12"
# Name: what .env holds, and what the message must say.
MISTAKES = {
    "no address of NODES is this node's": ({"NODES": "10.1.1.1,10.1.1.2"}, r"NODES=10\.1\.1\.1,10\.1\.1\.2.*\.env:2"),
    "two addresses of NODES are this node's": ({"NODES": f"{OWN},10.88.0.1"}, r"NODES=.*NODE_RANK \(0 or 1\)"),
    "NODE_RANK beyond the last node": ({"NODES": f"{OWN},{OTHER}", "NODE_RANK": "2"}, r"NODE_RANK=2.*\.env:3.*0.*1"),
    "NODE_RANK that is no number": ({"NODES": f"{OWN},{OTHER}", "NODE_RANK": "first"}, r"NODE_RANK=first.*\.env:3"),
    "NODES with a node twice": ({"NODES": f"{OWN},{OTHER},{OTHER}"}, r"NODES=.*(twice|same|dupl|one machine)"),
    "NODES with a name nobody knows": ({"NODES": f"{OWN},nowhere.invalid"}, r"NODES=.*nowhere\.invalid has no address"),
    "a port out of range": ({"MASTER_PORT": "70000"}, r"MASTER_PORT=70000 \(.*\.env:2\).*1 to 65535"),
    "a control port out of range": ({"CONTROL_PORT": "0"}, r"CONTROL_PORT=0 \(.*\.env:2\).*1 to 65535"),
    "a script that is not there": ({"TRAIN_SCRIPT": "/workspace/no.py"}, r"TRAIN_SCRIPT=/workspace/no\.py.*\.env:2"),
    "more processes than GPUs": ({"NPROC_PER_NODE": "gpu"}, r"NPROC_PER_NODE=gpu.*no (NVIDIA )?GPU"),
}


def one_message(said: str) -> str:
    """What the launcher said, without Compose's own lines."""
    lines = [line for line in said.splitlines() if not re.match(r"\s*(Volume|Container) ", line)]
    return "\n".join(lines).strip()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_value_and_place(cluster2: Cluster, mistake: str) -> None:
    env, expected = MISTAKES[mistake]
    node = cluster2.nodes[0]
    if mistake.startswith("two addresses"):
        node.shell("ip", "address", "replace", "10.88.0.1/32", "dev", node.interface)
    try:
        before = time.monotonic()
        done = node.run(env={name: value.format(number=cluster2.number) for name, value in env.items()})
        seconds = time.monotonic() - before
    finally:
        if mistake.startswith("two addresses"):
            node.shell("ip", "address", "delete", "10.88.0.1/32", "dev", node.interface)
    message = one_message(done.output)
    assert done.code == 2, message
    assert re.search(expected, message), message
    assert "Traceback" not in message
    # One sentence, and where ranks are in doubt a small table of both sides.
    assert len(message.splitlines()) <= 4, message
    assert seconds < 15


@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        ("MASTER_PORT=29400\n", 0o600, r"/workspace/my\.env.*(permission|read)"),
        ("MASTER_PORT=29400\nthis is no line\n", 0o644, r"my\.env:2 .*NAME=value"),
    ],
    ids=["a file that the user may not read", "a line that is no setting"],
)
def test_an_env_file_that_cannot_be_used_is_named(cluster2: Cluster, text: str, mode: int, expected: str) -> None:
    node = cluster2.nodes[0]
    stack = node.stack(files={"workspace/my.env": text})
    file = stack.folder / "workspace" / "my.env"
    file.chmod(mode)
    # Root's: what the testbed lays out there is the container user's.
    os.chown(file, 0, 0)
    done = node.run_in(stack, options=("--env", "ENV_FILE=/workspace/my.env"))
    message = one_message(done.output)
    assert done.code == 2, message
    assert re.search(expected, message, re.IGNORECASE), message
    assert "Traceback" not in message


def test_compose_names_the_line_of_env_that_it_cannot_read(cluster2: Cluster) -> None:
    with pytest.raises(BedError, match=r"\.env: line 3: key cannot contain a space"):
        cluster2.nodes[0].up({"NODES": "127.0.0.1\nthis is no line"})


def test_an_env_file_that_only_its_owner_may_read_is_enough(cluster2: Cluster) -> None:
    node = cluster2.nodes[0]
    stack = node.stack({"MAX_RESTARTS": "9"})
    (stack.folder / ".env").chmod(0o600)
    # Compose, run by the owner, hands the values over; only the line numbers in messages are lost.
    done = node.run_in(stack, "explain")
    assert done.code == 0, done.output
    assert "MAX_RESTARTS=9" in done.output


def test_a_misspelt_variable_is_a_warning_that_names_the_right_one(cluster2: Cluster) -> None:
    done = cluster2.nodes[0].run("explain", env={"NPROC_PER_NODES": "2"})
    assert done.code == 0, done.output
    assert re.search(r"NPROC_PER_NODES.*NPROC_PER_NODE\b", done.output)


def test_all_mistakes_are_told_at_once(cluster2: Cluster) -> None:
    done = cluster2.nodes[0].run(env={"MASTER_PORT": "x", "START_TIMEOUT": "soon", "BACKEND": "mpi"})
    assert done.code == 2
    assert [name for name in ("MASTER_PORT=x", "START_TIMEOUT=soon", "BACKEND=mpi") if name not in done.output] == []


def test_wrong_settings_end_the_engines_own_retries_with_one_line_each(cluster2: Cluster) -> None:
    stack = cluster2.nodes[0].up({"MASTER_PORT": "x"})
    assert stack.wait(60) == 2
    first, *others = stack.logs().splitlines()
    assert "MASTER_PORT=x (.env:2)" in first
    assert len(others) == stack.restarts <= 5
    assert all("not started again: MASTER_PORT=x" in line for line in others)
