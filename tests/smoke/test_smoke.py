"""The image built and two nodes trained on whatever engine this user has: no root, no namespaces.

make smoke           # or, with another base image: BASE_IMAGE=debian:13-slim make smoke
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import docker
import pytest

PROJECT = Path(__file__).resolve().parents[2]
IMAGE = "torchrun-compose:smoke"
NODES = ("127.0.0.1", "127.0.0.2")
RANKS_PER_NODE = 2
BUILD_SECONDS, RUN_SECONDS = 3600, 300
ALL_REDUCE = """
import json, os
import torch, torch.distributed as dist

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
row = torch.arange(1000, dtype=torch.float64)
total = row * (rank + 1)
dist.all_reduce(total)
# Each rank contributes rank + 1 times the row, so the sum is the row times 1 + 2 + ... + world.
right = torch.equal(total, row * (world * (world + 1) // 2))
print("SMOKE " + json.dumps({"rank": rank, "world": world, "right": right, "uid": os.getuid()}), flush=True)
dist.destroy_process_group()
"""


def compose(folder: Path, env: Mapping[str, str], *words: str, timeout: float = 120) -> None:
    command = ["docker", "compose", "--ansi", "never", *words]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **env}, timeout=timeout, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a user has after `git clone`, with a script of their own in workspace/."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, target)
    (tmp_path / "workspace/smoke.py").write_text(ALL_REDUCE)
    # This engine is a user's: the volume with their runs is not ours to use or to remove.
    own = "volumes: {runs: {name: '${COMPOSE_PROJECT_NAME}_runs'}}\n"
    (tmp_path / "compose.override.yaml").write_text(own)
    for folder in (tmp_path, tmp_path / "workspace"):
        folder.chmod(0o777)
    return tmp_path


@pytest.fixture
def image(checkout: Path) -> str:
    """Built by the real compose file, with BASE_IMAGE and WHEELHOUSE of the shell if they are set."""
    compose(checkout, {"IMAGE": IMAGE}, "build", timeout=BUILD_SECONDS)
    return IMAGE


@pytest.fixture
def projects(checkout: Path) -> Iterator[list[dict[str, str]]]:
    """Two compose projects on one engine: the whole of 127.0.0.0/8 is this machine, so each node has an address."""
    shared = {
        "IMAGE": IMAGE,
        "NODES": ",".join(NODES),
        "NPROC_PER_NODE": str(RANKS_PER_NODE),
        "TRAIN_SCRIPT": "/workspace/smoke.py",
        "RESTART": "no",
    }
    made = [
        {**shared, "NODE_RANK": str(rank), "COMPOSE_PROJECT_NAME": f"torchrun-compose-smoke-{rank}"}
        for rank in range(len(NODES))
    ]
    yield made
    for env in made:
        compose(checkout, env, "down", "--volumes")


def test_the_image_builds_and_two_stacks_on_this_engine_all_reduce_to_the_closed_form(
    checkout: Path, image: str, projects: list[dict[str, str]]
) -> None:
    for env in projects:
        compose(checkout, env, "up", "--detach", "--no-build")
    client = docker.from_env()
    said, codes = "", []
    for env in projects:
        labels = [f"com.docker.compose.project={env['COMPOSE_PROJECT_NAME']}", "com.docker.compose.service=trainer"]
        (container,) = client.containers.list(all=True, filters={"label": labels})
        codes.append(container.wait(timeout=RUN_SECONDS)["StatusCode"])
        said += container.logs().decode(errors="replace")
    found = [json.loads(line.partition("SMOKE ")[2]) for line in said.splitlines() if "SMOKE " in line]
    world = len(NODES) * RANKS_PER_NODE
    assert codes == [0, 0], said
    assert sorted(each["rank"] for each in found) == list(range(world)), said
    assert all(each["right"] and each["world"] == world and each["uid"] != 0 for each in found), said
