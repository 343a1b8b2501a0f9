"""`make demo` with a Docker engine in reach: two compose stacks of one machine (tests/native has it without one)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.testbed.base import base_image
from tests.testbed.engines import find_tools
from tests.testbed.image import builder, store, store_lock, wheelhouse
from tests.testbed.shell import PROJECT

# The testbed's engines have no bridge network; a user's engine has one, and builds in it.
BUILD_ON_HOST_NETWORK = "services: {trainer: {build: {network: host}}}\n"


def test_with_an_engine_two_compose_stacks_train_with_falling_loss_and_leave_their_runs_on_the_host(
    tmp_path: Path,
) -> None:
    override = tmp_path / "override.yaml"
    override.write_text(BUILD_ON_HOST_NETWORK)
    # The container's user is not root, and pytest's folders are closed to others.
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    tools = find_tools()
    with store_lock(tools), builder(tools, store(tools)) as engine:
        # Those of a run that was cut off: this engine starts them again.
        for container in engine.client.containers.list(all=True):
            container.remove(force=True, v=True)
        environment = {
            **os.environ,
            **engine.environment,
            "BASE_IMAGE": base_image(tools, engine.docker_host),
            "WHEELHOUSE": str(wheelhouse()),
            "COMPOSE_FILE": f"{PROJECT / 'compose.yaml'}:{override}",
            "TRAIN_ARGS": "--steps=20 --log-every=5 --sample=0 --eval-every=0",
            "RUNS_ROOT": str(tmp_path),
        }
        demo = subprocess.run(
            [sys.executable, "-m", "demo"], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=600
        )

    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "The nodes are two compose stacks." in demo.stdout
    losses = [float(loss) for loss in re.findall(r"^node 0 \| .*step \d+/20  loss ([\d.]+)", demo.stdout, re.MULTILINE)]
    assert losses[-1] < losses[0] - 0.5
    folders = re.findall(r"^node \d: exit code 0; checkpoints and logs in (.+)$", demo.stdout, re.MULTILINE)
    assert len(folders) == 2
    assert all(any(Path(folder, "checkpoints").iterdir()) for folder in folders)
    assert "cp .env.example .env" in demo.stdout.rpartition("exit code 0")[2]
