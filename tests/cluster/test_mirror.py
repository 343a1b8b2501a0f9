"""Two nodes, each with its own disk: a script that saves on rank 0 alone resumes at the same step on both, whatever
is lost."""

from __future__ import annotations

import re

from tests.testbed import Cluster, Stack

SAVES_ON_RANK_0 = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, path, last = dist.get_rank(), os.path.join(os.environ["CHECKPOINT_DIR"], "snapshot.pt"), int(sys.argv[1])
start = torch.load(path)["epoch"] if os.path.exists(path) else 0
print(f"rank {rank} begins at {start}", flush=True)
for epoch in range(start, last):
    dist.all_reduce(torch.ones(1))
    if rank == 0:
        torch.save({"epoch": epoch + 1}, path)
    time.sleep(0.02)
dist.barrier()
dist.destroy_process_group()
"""


def run(bed: Cluster, last: int) -> list[Stack]:
    env = {"NODES": bed.addresses, "NPROC_PER_NODE": "1", "TRAIN_SCRIPT": "/workspace/saves.py"}
    env |= {"TRAIN_ARGS": str(last)}
    stacks = [node.up(env, files={"workspace/saves.py": SAVES_ON_RANK_0}) for node in bed.nodes]
    codes = [stack.wait(120) for stack in stacks]
    assert codes == [0, 0], "\n".join(stack.tail() for stack in stacks)
    return stacks


def begins(stacks: list[Stack]) -> list[int]:
    return [int(found) for stack in stacks for found in re.findall(r"rank \d begins at (\d+)", stack.logs())]


def test_what_rank_0_saved_is_on_both_nodes_and_outlives_the_disk_of_node_0(cluster2: Cluster) -> None:
    assert begins(run(cluster2, 5)) == [0, 0]
    assert begins(run(cluster2, 8)) == [5, 5]
    cluster2.nodes[0].clear()
    assert begins(run(cluster2, 9)) == [8, 8], "node 1 got the last epochs as the second run ended"
