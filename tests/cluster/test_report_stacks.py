"""Reports of jobs that fail on real engines, printed by a container that did not run the job."""

from __future__ import annotations

from tests.testbed import Cluster

HUNGRY = """
import os, time
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if os.environ["RANK"] == "1":
    hoard = []
    while True:
        hoard.append(os.urandom(1 << 24))
time.sleep(120)
"""
# Docker's own limit; without swap, so that it is reached in seconds.
LIMIT = "services: {trainer: {mem_limit: 700m, memswap_limit: 700m}}\n"


def test_a_worker_killed_for_memory_is_reported_as_such_on_its_node(cluster2: Cluster) -> None:
    settings = {
        "NODES": cluster2.addresses,
        "NPROC_PER_NODE": "1",
        "MAX_RESTARTS": "0",
        "TRAIN_SCRIPT": "/workspace/hungry.py",
    }
    files = {"workspace/hungry.py": HUNGRY, "compose.override.yaml": LIMIT}
    stacks = [node.up(settings, files=files) for node in cluster2.nodes]
    assert [stack.wait(90) for stack in stacks] == [5, 5]
    told = [stack.compose("run", "--rm", "-T", "trainer", "report") for stack in stacks]
    for text in told:
        assert len(text.strip().splitlines()) <= 15
        assert "rank 1 was ended by SIGKILL (out of memory, or killed by hand)" in text
    assert "kills for memory +1" in told[1]
    assert "kills for memory" not in told[0]
