"""Scripts that know nothing of this project train on two nodes as they are, in the image extended as the docs say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed import Cluster, cluster
from tests.testbed.engines import find_tools
from tests.testbed.image import builder, buildx, ensure_image, store, store_lock
from tests.testbed.shell import PROJECT

SCRIPTS = PROJECT / "tests/scripts"
IMAGE = "torchrun-compose:extended"
STYLES = {"classic.py": "snapshot.pt", "with_accelerate.py": "accelerate", "with_fabric.py": "fabric.ckpt"}
"""Each script, and what it leaves in CHECKPOINT_DIR."""


def documented() -> str:
    """The Dockerfile that docs/training.md gives to people whose script needs more packages."""
    found = re.search(r"```dockerfile\n(.*?)```", (PROJECT / "docs/training.md").read_text(), re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that have the extended image: nodes take over all images there are when they are made."""
    folder: Path = tmp_path_factory.mktemp("extended")
    (folder / "Dockerfile").write_text(documented())
    tools = find_tools()
    ensure_image(tools)
    with store_lock(tools), builder(tools, store(tools)) as engine:
        buildx(engine, folder, IMAGE)
    with cluster(nodes=2, tools=tools) as bed:
        yield bed


@pytest.mark.parametrize("script", STYLES)
def test_a_script_of_each_style_runs_as_it_is(extended: Cluster, script: str) -> None:
    extended.clear()
    env = {"NODES": extended.addresses, "NPROC_PER_NODE": "2", "TRAIN_SCRIPT": f"/workspace/{script}", "IMAGE": IMAGE}
    files = {f"workspace/{script}": (SCRIPTS / script).read_text()}
    stacks = [node.up(env, files=files) for node in extended.nodes]
    assert [stack.wait(120) for stack in stacks] == [0, 0], "\n".join(stack.tail() for stack in stacks)
    said = re.findall(r"rank (\d) of 4 done, loss 0\.0", "".join(stack.logs() for stack in stacks))
    assert set(said) == {"0", "1", "2", "3"}
    assert any(STYLES[script] in name for name in stacks[0].list("/runs/default/checkpoints"))
