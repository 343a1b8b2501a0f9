"""Images of others, with a torch of their own: the launcher comes along, and their packages stay as they are."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed import BedError, Cluster, cluster
from tests.testbed.base import base_image
from tests.testbed.engine import Engine
from tests.testbed.engines import find_tools
from tests.testbed.image import builder, buildx, ensure_image, store, store_lock, wheelhouse
from tests.testbed.shell import PROJECT, run

THEIRS, OLD, LAUNCHER = "local/theirs:torch", "local/theirs:old", "torchrun-compose:launcher"
ON_BASE, OWN_DOCKERFILE = "torchrun-compose:base", "local/theirs:with-launcher"
# torch in a place of its own, not on PATH, with a user of its own, and nothing that the launcher is used to.
THEIR_DOCKERFILE = """
ARG BASE_IMAGE
FROM scratch AS wheels
FROM ${BASE_IMAGE}
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \\
    python3 -m venv /opt/other && /opt/other/bin/pip install -q --find-links=/wheels torch numpy
RUN useradd --uid 1234 worker
ENV HOME=/home/worker
USER worker
ENTRYPOINT ["/bin/false"]
"""
HANDLERS = "torch/distributed/elastic/multiprocessing/subprocess_handler/handlers.py"
OLD_DOCKERFILE = f"FROM {THEIRS}\nUSER 0\nRUN rm /opt/other/lib/python3*/site-packages/{HANDLERS}\n"
PACKAGES = "dpkg -l; find /opt/other /usr/lib/python3 -printf '%p %y %s %T@\\n' | LC_ALL=C sort"
SHORT = "--steps 4 --layers 1 --width 32 --heads 2 --batch 8 --sample 0 --eval-every 0"


def made(engine: Engine, folder: Path, tag: str, dockerfile: str, *options: str) -> None:
    (folder / "Dockerfile").write_text(dockerfile)
    buildx(engine, folder, tag, "--progress=plain", *options)


def documented() -> str:
    """The Dockerfile of docs/images.md, on the stand-in."""
    found = re.search(r"```dockerfile\n(.*?)```", (PROJECT / "docs/images.md").read_text(), re.DOTALL)
    assert found
    return found[1].replace("FROM your/image", f"FROM {THEIRS}")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that have all images of this file: nodes take over what there is when they are made."""
    folder: Path = tmp_path_factory.mktemp("images")
    tools = find_tools()
    ensure_image(tools)
    with store_lock(tools), builder(tools, store(tools)) as engine:
        base = f"--build-arg=BASE_IMAGE={base_image(tools, engine.docker_host)}"
        made(engine, folder, THEIRS, THEIR_DOCKERFILE, base, f"--build-context=wheels={wheelhouse()}")
        made(engine, folder, OLD, OLD_DOCKERFILE)
        buildx(engine, PROJECT, LAUNCHER, "--target=launcher", base)
        buildx(engine, PROJECT, ON_BASE, f"--build-arg=BASE_IMAGE={THEIRS}", "--build-arg=TORCH=base")
        made(engine, folder, OWN_DOCKERFILE, documented())
        with pytest.raises(BedError, match="no Python of this image can train"):
            buildx(engine, PROJECT, "local/none", "--progress=plain", base, "--build-arg=TORCH=base")
    with cluster(nodes=2, tools=tools) as bed:
        yield bed


@pytest.mark.parametrize("image", [ON_BASE, OWN_DOCKERFILE, THEIRS])
def test_an_image_with_its_own_torch_trains_on_two_engines_and_keeps_its_packages(images: Cluster, image: str) -> None:
    images.clear()
    theirs = packages(images, THEIRS)
    assert packages(images, image) == theirs
    assert packages(images, OLD) != theirs, "one file less is seen"
    env = {"NODES": images.addresses, "NPROC_PER_NODE": "1", "IMAGE": image, "TRAIN_ARGS": SHORT, "RUNS": "./runs"}
    stacks = [node.stack(env, files={"runs/empty": ""}) for node in images.nodes]
    for node, stack in zip(images.nodes, stacks, strict=True):
        (stack.folder / "runs").chmod(0o777)
        if image == THEIRS:
            # The launcher of the folder is used by this image alone.
            shutil.copytree(PROJECT / "app", stack.folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(PROJECT / "entrypoint.py", stack.folder)
        node.start(stack)
    assert [stack.wait(120) for stack in stacks] == [0, 0], "\n".join(stack.tail() for stack in stacks)
    assert "rank 1 of 2, local rank 0, node 1" in stacks[1].logs()


def packages(bed: Cluster, image: str) -> str:
    """Every package of the system, and every file of torch's Python with its size and time."""
    command = ["docker", "run", "--rm", "--network=host", "--user=0", "--entrypoint=sh", image, "-c", PACKAGES]
    listed = run(command, env=bed.nodes[0].engine.environment, timeout=120)
    assert "/opt/other/bin/python3" in listed
    return listed


@pytest.mark.parametrize(
    ("image", "why"),
    [(OLD, r"/opt/other/bin/python3: its torch is too old"), ("theirs-without-torch", r"python3: it has no torch")],
)
def test_an_image_that_cannot_train_is_refused_by_a_sentence(images: Cluster, image: str, why: str) -> None:
    images.clear()
    node = images.nodes[0]
    if image != OLD:
        image = base_image(images.tools, node.engine.docker_host)
    stack = node.stack({"IMAGE": image, "RESTART": "no"})
    shutil.copytree(PROJECT / "app", stack.folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "entrypoint.py", stack.folder)
    node.start(stack)
    assert stack.wait(60) == 2
    assert re.search(why, stack.logs()), stack.logs()
