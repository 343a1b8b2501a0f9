"""Training on real nodes, each with a disk of its own: what dies changes no loss."""

from __future__ import annotations

import json
from typing import Any

from tests.testbed import Cluster, Stack

STEPS = 160
FLAGS = (
    f"--steps {STEPS} --checkpoint-every 10 --log-every 1 --layers 1 --width 32 --heads 2 --context 32 --batch 8 "
    "--sample 0 --eval-every 0"
)


def _up(bed: Cluster) -> list[Stack]:
    return [node.up({"NODES": bed.addresses, "NPROC_PER_NODE": "1", "TRAIN_ARGS": FLAGS}) for node in bed.nodes]


def _records(stack: Stack) -> list[dict[str, Any]]:
    lines = stack.read("/runs/default/metrics.jsonl").decode().splitlines()
    return [record for record in (json.loads(line) for line in lines) if "loss" in record]


def _losses(stack: Stack) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in _records(stack)}


def test_a_killed_rank_a_killed_container_and_a_lost_disk_change_no_loss(cluster2: Cluster) -> None:
    whole = _up(cluster2)
    assert [stack.wait(240) for stack in whole] == [0, 0], "\n".join(stack.tail() for stack in whole)
    reference = _losses(whole[0])
    assert sorted(reference) == list(range(1, STEPS + 1))
    cluster2.clear()

    stacks = _up(cluster2)
    stacks[0].wait_for(r"step 2\d/")
    assert stacks[1].signal(r"-m app\.train") >= 1
    stacks[0].wait_for(r"resumed after step \d+", 120)
    stacks[0].wait_for(r"step 6\d/", 120)
    stacks[1].kill()
    stacks[1].start()
    stacks[0].wait_for(r"resumed after step", 120, times=2)
    stacks[0].wait_for(r"step 10\d/", 120)
    for stack in stacks:
        stack.kill()
    before = _records(stacks[0])
    stacks[0].compose("down", "--volumes")
    for stack in stacks:
        stack.start()
    resumed = stacks[0].wait_for(r"resumed after step (\d+)", 120)
    assert int(resumed[1]) >= 60, "node 1 fed the node that came back empty"
    assert [stack.wait(240) for stack in stacks] == [0, 0], "\n".join(stack.tail() for stack in stacks)
    assert not [record for record in before + _records(stacks[0]) if record["loss"] != reference[record["step"]]]
    assert sorted(_losses(stacks[0])) == list(range(int(resumed[1]) + 1, STEPS + 1))
