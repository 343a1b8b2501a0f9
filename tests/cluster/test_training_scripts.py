"""Scripts that know nothing of this project train on two nodes as they are, in the image extended as the docs say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed import Cluster, cluster
from tests.testbed.engines import find_tools
from tests.testbed.image import builder, buildx, ensure_image, store, store_lock
from tests.testbed.shell import PROJECT
from tests.testbed.stack import VOLUME

SCRIPTS = PROJECT / "tests/scripts"
IMAGE = "torchrun-compose:extended"
STYLES = {"classic.py": "snapshot.pt", "with_accelerate.py": "accelerate", "with_fabric.py": "fabric.ckpt"}
"""Each script, and what it leaves in CHECKPOINT_DIR."""


def documented() -> str:
    """The Dockerfile that docs/own-script.md gives to people whose script needs more packages."""
    found = re.search(r"```dockerfile\n(.*?)```", (PROJECT / "docs/own-script.md").read_text(), re.DOTALL)
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


WRITES = """
import os
from pathlib import Path
Path("out.txt").write_text(os.getcwd())
Path(os.environ["CHECKPOINT_DIR"], "last.pt").write_text("saved")
Path(os.path.expanduser("~/.cache/tool")).mkdir(parents=True, exist_ok=True)
print("written as", os.getuid(), os.environ["HOME"])
"""


@pytest.mark.parametrize("user", ["1000:1000", "1234:1235"])
def test_the_current_folder_and_what_is_written_there_are_the_users(cluster2: Cluster, user: str) -> None:
    cluster2.clear()
    node, (uid, gid) = cluster2.nodes[0], map(int, user.split(":"))
    env = {"NPROC_PER_NODE": "1", "TRAIN_SCRIPT": "my.py", "RUN_AS": user, "CHECKPOINT_DIR": "/workspace/out"}
    stack = node.stack(env, files={"workspace/my.py": WRITES})
    workspace = stack.folder / "workspace"
    os.chown(workspace, uid, gid)
    node.start(stack)
    assert stack.wait(60) == 0, stack.tail()
    written = workspace / "out.txt"
    assert (written.read_text(), written.stat().st_uid, written.stat().st_gid) == ("/workspace", uid, gid)
    assert (workspace / "out/last.pt").read_text() == "saved"
    said = stack.logs()
    assert f"written as {uid} /runs/.home/{uid}" in said
    assert f"results: /runs/default in volume {VOLUME}" in said
    assert f"checkpoints: {workspace}/out on this host" in said


def test_a_folder_of_another_user_is_told_with_the_hosts_path_and_the_command(cluster2: Cluster) -> None:
    cluster2.clear()
    node, script = cluster2.nodes[0], "print('trained')"
    stack = node.stack({"NPROC_PER_NODE": "1", "TRAIN_SCRIPT": "my.py"}, files={"workspace/my.py": script})
    workspace = stack.folder / "workspace"
    os.chown(workspace, 0, 0)
    node.start(stack)
    assert stack.wait(60) == 0, stack.tail()
    assert f"sudo chown -R 1000:1000 {workspace}" in stack.logs()
    stack = node.stack(
        {"NPROC_PER_NODE": "1", "TRAIN_SCRIPT": "my.py", "WORKSPACE_READ_ONLY": "true"},
        files={"workspace/my.py": "import os; print('may write:', os.access('.', os.W_OK))"},
    )
    node.start(stack)
    assert stack.wait(60) == 0, stack.tail()
    assert "may write: False" in stack.logs()
    assert "sudo chown" not in stack.logs()
