"""`make demo` as a stranger runs it, on a machine without a Docker engine (tests/cluster has it with one)."""

import os
import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def test_without_an_engine_two_native_nodes_train_with_falling_loss_and_say_where_the_checkpoints_are(
    tmp_path: Path,
) -> None:
    # A user's own settings of a real cluster are not for the demo.
    (tmp_path / ".env").write_text(
        "NODES=192.0.2.1,192.0.2.2\nMASTER_ADDR=192.0.2.1\nNNODES=2\nTRAIN_SCRIPT=/workspace/my.py\nGLOO_SOCKET_IFNAME=x0\n"
    )
    # An empty PATH has no docker; the interpreter is named by its own path.
    own = {"PATH": str(tmp_path), "ENV_FILE": str(tmp_path / ".env")}
    environment = {
        **os.environ,
        **own,
        "TRAIN_ARGS": "--steps=20 --log-every=5 --sample=0 --eval-every=0",
        "RUNS_ROOT": str(tmp_path),
    }
    demo = subprocess.run(
        [sys.executable, "-m", "demo"], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=180
    )

    assert demo.returncode == 0, demo.stdout + demo.stderr
    first, *_ = demo.stdout.splitlines()
    assert first.startswith("Two nodes (127.0.0.1, 127.0.0.2)")
    assert "The nodes are two native launchers: no docker command is on PATH." in demo.stdout
    losses = [float(loss) for loss in re.findall(r"^node 0 \| .*step \d+/20  loss ([\d.]+)", demo.stdout, re.MULTILINE)]
    assert losses[-1] < losses[0] - 0.5
    folders = re.findall(r"^node \d: exit code 0; checkpoints and logs in (.+)$", demo.stdout, re.MULTILINE)
    assert len(folders) == 2
    assert all(any(Path(folder, "checkpoints").iterdir()) for folder in folders)
    assert "cp .env.example .env" in demo.stdout.rpartition("exit code 0")[2]
