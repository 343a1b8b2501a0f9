"""The smoke test for a CI job: one engine, two stacks on it, one all-reduce over all ranks."""

from __future__ import annotations

import docker
import pytest

from tests.testbed import Cluster
from tests.testbed.stack import Stack

RANKS_PER_NODE = 2
ALL_REDUCE = """
import os
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
steps = torch.arange(1000, dtype=torch.float64)
# Each rank contributes rank + 1 times the row, so the sum is the row times 1 + 2 + ... + world.
total = steps * (rank + 1)
dist.all_reduce(total)
assert torch.equal(total, steps * (world * (world + 1) // 2)), total
print(f"all-reduce over {world} ranks is right on rank {rank}", flush=True)
dist.destroy_process_group()
"""


@pytest.fixture
def stacks(cluster2: Cluster) -> list[Stack]:
    """Two compose projects on one engine: the whole of 127.0.0.0/8 is this machine, so each node has an address."""
    env = {
        "NODES": "127.0.0.1,127.0.0.2",
        "NPROC_PER_NODE": str(RANKS_PER_NODE),
        "TRAIN_SCRIPT": "/workspace/smoke.py",
        "RESTART": "no",
    }
    files = {"workspace/smoke.py": ALL_REDUCE}
    node = cluster2.nodes[0]
    return [node.up(env, exports={"NODE_RANK": rank}, files=files, project=f"node{rank}") for rank in ("0", "1")]


def test_an_all_reduce_over_two_stacks_on_one_engine_is_the_closed_form(stacks: list[Stack]) -> None:
    client: docker.DockerClient = stacks[0].engine.client
    label: dict[str, str | list[str] | bool] = {"label": "com.docker.compose.service=trainer"}
    containers = client.containers.list(all=True, filters=label)
    assert len(containers) == 2
    assert [container.wait(timeout=120)["StatusCode"] for container in containers] == [0, 0]
    said = "".join(container.logs().decode() for container in containers)
    world = 2 * RANKS_PER_NODE
    missing = [rank for rank in range(world) if f"over {world} ranks is right on rank {rank}" not in said]
    assert missing == [], said


def test_the_image_says_what_it_is(cluster2: Cluster) -> None:
    config = cluster2.nodes[0].engine.client.images.get(cluster2.image).attrs["Config"]
    assert config["Labels"]["org.opencontainers.image.title"] == "torchrun-compose"
    assert config["Labels"]["org.opencontainers.image.base.name"]
    assert config["User"] == "1000:1000"
    assert config["Healthcheck"]["Test"][-1] == "healthcheck"
    assert not [value for value in config["Env"] if "TOKEN" in value or "PASSWORD" in value]
