"""Two jobs on the same two engines: they train beside each other, or the second is refused; none replaces the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from tests.testbed import Cluster, Node, Stack

# Longer than any test; it is stopped.
LONG = "--steps 100000 --layers 1 --width 32 --heads 2 --batch 8 --sample 0 --eval-every 0 --log-every 1"
STEP = r"step (\d+)/"


def up(node: Node, env: Mapping[str, str], **shell: str) -> Stack:
    """`docker compose up` in a clone of its own, under the name that compose.yaml gives the stack."""
    return start(node.stack(env, exports=shell, project=""))


def start(clone: Stack, **shell: str) -> Stack:
    """The same in a clone that is there, with more in the user's shell."""
    clone = replace(clone, exports={**clone.exports, **shell})
    name = json.loads(clone.compose("config", "--format", "json"))["name"]
    clone.compose("up", "--detach", "--no-build")
    return replace(clone, project=name)


def settings(bed: Cluster) -> dict[str, str]:
    return {"NODES": bed.addresses, "NPROC_PER_NODE": "1", "TRAIN_ARGS": LONG, "START_TIMEOUT": "60"}


def test_another_run_name_trains_beside_the_first_job_from_the_same_clone(cluster2: Cluster) -> None:
    first = [up(node, settings(cluster2)) for node in cluster2.nodes]
    first[0].wait_for(STEP)
    second = [start(stack, RUN_NAME="Second.1", MASTER_PORT="29410") for stack in first_clones(first)]
    second[0].wait_for(STEP)
    seen = len(first[0].logs().splitlines())
    first[0].wait_for(STEP, times=seen + 2)
    assert [stack.restarts for stack in (*first, *second)] == [0] * 4
    second[1].stop()
    assert [stack.wait() for stack in second] == [0, 143]
    assert all(stack.running for stack in first), "the stop of one job is not heard by the other"
    assert second[0].list("/runs/Second.1/checkpoints")


def first_clones(stacks: list[Stack]) -> list[Stack]:
    return [replace(stack, project="") for stack in stacks]


def test_another_run_name_on_the_same_port_is_refused_with_the_word_to_set(cluster2: Cluster) -> None:
    first = [up(node, settings(cluster2)) for node in cluster2.nodes]
    first[0].wait_for(STEP)
    second = [start(stack, RUN_NAME="second") for stack in first_clones(first)]
    assert all(stack.wait(60) for stack in second)
    assert all("MASTER_PORT" in stack.logs() for stack in second)
    assert all(stack.running and stack.restarts == 0 for stack in first)


def test_the_same_job_in_another_clone_is_refused_and_the_first_trains_on(cluster2: Cluster) -> None:
    first = [up(node, settings(cluster2)) for node in cluster2.nodes]
    first[0].wait_for(STEP)
    second = [up(node, settings(cluster2)) for node in cluster2.nodes]
    assert [stack.wait(60) for stack in second] == [2, 2]
    assert all("a job of that name is running" in stack.logs() for stack in second)
    seen = len(first[0].logs().splitlines())
    first[0].wait_for(STEP, times=seen + 2)
    assert all(stack.running and stack.restarts == 0 for stack in first)
