"""Recipes of examples/ on two engines, each node with a disk of its own: every rank resumes at the same step, whatever
is lost. Those that need more than the image has: tests/native/test_examples.py, where their packages are."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from dotenv import dotenv_values

from tests.testbed import Cluster, Node, Stack

EXAMPLES = Path(__file__).parents[2] / "examples"
BEGINS = r"rank \d begins at (?:epoch|step|iter) (\d+)"


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "gpt"])
def test_a_recipe_resumes_on_all_ranks_whatever_is_lost(cluster2: Cluster, name: str) -> None:
    cluster2.clear()
    first, second = cluster2.nodes
    stacks = [up(cluster2, node, name) for node in cluster2.nodes]
    for stack in stacks:
        stack.wait_for(r"(?:epoch|step|iter) 2[1-9] loss", 120)
    assert stacks[1].signal(r"^rank3 ", signal.SIGKILL) == 1
    seen = [begun(stacks[0], 2)]
    assert begun(stacks[1], 2) == seen[0]
    for place, node in enumerate((first, second)):
        other = stacks[1 - place]
        other.wait_for(rf"(?:epoch|step|iter) {seen[-1] // 10 + 1}[5-9] loss", 120)
        times = len(re.findall(BEGINS, other.logs())) // 2 + 1
        node.kill()
        node.clear()
        stacks[place] = up(cluster2, node, name)
        seen.append(begun(stacks[place], 1))
        assert begun(other, times) == seen[-1]
    assert [stack.wait(120) for stack in stacks] == [0, 0], "\n".join(stack.tail() for stack in stacks)
    assert min(seen) > 0


def up(bed: Cluster, node: Node, name: str) -> Stack:
    given = {key: value or "" for key, value in dotenv_values(EXAMPLES / name / ".env").items()}
    steps = {"EPOCHS": "100", "STEPS": "100", "PAUSE": "0.2", "MAX_RESTARTS": "5"}
    env = {**given, **steps, "NODES": bed.addresses, "NPROC_PER_NODE": "2", "WORKSPACE": "./workspace"}
    return node.up(env, files={"workspace/train.py": (EXAMPLES / name / "train.py").read_text()})


def begun(stack: Stack, times: int) -> int:
    """Where both ranks of a node began for the `times`-th time."""
    stack.wait_for(BEGINS, 120, times=2 * times)
    found = re.findall(BEGINS, stack.logs())[2 * times - 2 : 2 * times]
    assert len(set(found)) == 1, found
    return int(found[0])
