"""Two engines, two nodes, one .env: `docker compose up` on each trains, whatever says which node is which."""

from __future__ import annotations

import hashlib
import json
import re
import shlex

from tests.testbed import Cluster, Stack

# Enough for the loss to leave the region where all bytes are alike, in about half a minute on two cores.
LEARN = "--steps 60 --sample 0"
# Only the start and the end are of interest.
SHORT = "--steps 4 --layers 1 --width 32 --heads 2 --batch 8 --sample 0 --eval-every 0"
NATS_PER_TOKEN = 2.9

PLACES = """
import os
from pathlib import Path
import torch.distributed as dist

dist.init_process_group("gloo")
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, {name: int(os.environ[name]) for name in names})
if os.environ["LOCAL_RANK"] == "0":
    print("PLACES", everyone, flush=True)
dist.destroy_process_group()
"""


def up(bed: Cluster, env: dict[str, str], *, ranks: bool = False, **workspace: str) -> list[Stack]:
    """Every node with the same .env; with `ranks`, NODE_RANK in each node's shell."""
    files = {f"workspace/{name}.py": text for name, text in workspace.items()}
    exports = [{"NODE_RANK": str(node.index)} if ranks else {} for node in bed.nodes]
    return [node.up(env, exports=export, files=files) for node, export in zip(bed.nodes, exports, strict=True)]


def ended_well(stacks: list[Stack], deadline: float = 120) -> None:
    codes = [stack.wait(deadline) for stack in stacks]
    assert codes == [0] * len(stacks), "\n".join(stack.tail() for stack in stacks)
    assert [stack.restarts for stack in stacks] == [0] * len(stacks)


def test_two_nodes_find_their_ranks_by_their_addresses_and_learn(cluster2: Cluster) -> None:
    stacks = up(cluster2, {"NODES": cluster2.addresses, "NPROC_PER_NODE": "2", "TRAIN_ARGS": LEARN})
    ended_well(stacks)
    first, second = stacks
    for stack, ranks in ((first, (0, 1)), (second, (2, 3))):
        seen = re.findall(r"rank (\d) of 4, local rank (\d), node (\d)", stack.logs())
        node = stacks.index(stack)
        assert sorted(seen) == [(str(rank), str(rank % 2), str(node)) for rank in ranks]
    # The line holds the mean over all ranks. Held-out text, so that it cannot be learnt by heart.
    loss = re.search(r"held-out loss (\d\.\d+) nats/token", first.logs())
    assert loss is not None
    assert float(loss[1]) < NATS_PER_TOKEN
    assert weights(first) == weights(second)


def weights(stack: Stack) -> str:
    """A digest of the last checkpoint's tensors as they lie on a node's disk."""
    folder = "/runs/default/checkpoints"
    names = stack.list(f"{folder}/step-00000060")
    assert ".metadata" in names
    return hashlib.sha256(
        b"".join(stack.read(f"{folder}/step-00000060/{name}") for name in names if name != ".metadata")
    ).hexdigest()


def test_ranks_are_placed_by_the_formula_on_every_node(cluster2: Cluster) -> None:
    env = {"NODES": cluster2.addresses, "NPROC_PER_NODE": "2", "TRAIN_SCRIPT": "/workspace/places.py"}
    stacks = up(cluster2, env, places=PLACES)
    ended_well(stacks)
    for stack in stacks:
        everyone = json.loads(stack.wait_for(r"PLACES (.*)")[1].replace("'", '"'))
        assert [place["RANK"] for place in everyone] == [0, 1, 2, 3]
        assert all(place["RANK"] == place["GROUP_RANK"] * 2 + place["LOCAL_RANK"] for place in everyone)
        assert {(place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"]) for place in everyone} == {(4, 2)}


def test_the_rank_of_the_shell_serves_where_no_address_matches(cluster2: Cluster) -> None:
    listed = {f"10.99.0.{node.index + 1}": node.address for node in cluster2.nodes}
    for node in cluster2.nodes:
        node.translate(listed)
    env = {"NODES": ",".join(listed), "NPROC_PER_NODE": "1", "TRAIN_ARGS": SHORT}
    ended_well(up(cluster2, env, ranks=True))


def test_the_classic_variables_alone_are_enough(cluster2: Cluster) -> None:
    env = {
        "NNODES": "2",
        "MASTER_ADDR": cluster2.nodes[0].address,
        "MASTER_PORT": "29555",
        "NPROC_PER_NODE": "1",
        "TRAIN_ARGS": SHORT,
    }
    stacks = up(cluster2, env, ranks=True)
    ended_well(stacks)
    assert "port 29555" in stacks[1].logs()


def test_no_settings_at_all_means_one_node(cluster2: Cluster) -> None:
    stack = cluster2.nodes[0].up({"TRAIN_ARGS": SHORT})
    ended_well([stack])
    assert "rank 1 of 2, local rank 1, node 0" in stack.logs()


def test_a_script_of_the_user_runs_with_its_arguments_and_leaves_its_files_in_the_run(cluster2: Cluster) -> None:
    script = (
        "import os, sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "open(os.path.join(os.environ['RUN_DIR'], f'said-{dist.get_rank()}'), 'w').write(repr(sys.argv[1:]))\n"
        "dist.destroy_process_group()\n"
    )
    words = ["--name", "two words", "x"]
    env = {
        "NODES": cluster2.addresses,
        "NPROC_PER_NODE": "1",
        "RUN_NAME": "mine",
        "TRAIN_SCRIPT": "/workspace/mine.py",
        "TRAIN_ARGS": shlex.join(words),
    }
    stacks = up(cluster2, env, mine=script)
    ended_well(stacks)
    assert [stack.read(f"/runs/mine/said-{rank}").decode() for rank, stack in enumerate(stacks)] == [repr(words)] * 2


def test_arguments_of_the_command_win_over_the_settings(cluster2: Cluster) -> None:
    files = {"workspace/hello.py": "import sys; print('hello', sys.argv[1:])\n"}
    done = cluster2.nodes[0].run(
        "/workspace/hello.py", "--a", "b c", env={"TRAIN_SCRIPT": "-m app.train", "NPROC_PER_NODE": "1"}, files=files
    )
    assert done.code == 0, done.output
    assert "hello ['--a', 'b c']" in done.output


def test_four_nodes_train_together(cluster4: Cluster) -> None:
    stacks = up(cluster4, {"NODES": cluster4.addresses, "NPROC_PER_NODE": "1", "TRAIN_ARGS": SHORT})
    ended_well(stacks, 180)
    assert "rank 3 of 4, local rank 0, node 3" in stacks[3].logs()
