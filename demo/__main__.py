"""Two nodes on this one machine train a small GPT on real text: `make demo`.

With a Docker engine in reach they are two compose stacks, without one two native launchers; the node addresses are
127.0.0.1 and 127.0.0.2, so nothing leaves the machine.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from app.config.settings import TABLE

PROJECT = Path(__file__).resolve().parent.parent
ARGUMENTS = "--steps=80 --sample=0"
"""What so small a model writes after so few steps nobody can read."""
NEXT = """Next, on your machines:
  cp .env.example .env      # on each the same: NODES=ADDRESS,ADDRESS and HARDWARE=cpu, nvidia or nvidia-ib
  docker compose up         # on each; README.md shows what it prints
  TRAIN_SCRIPT=my.py docker compose up      # your own script, in ./workspace: docs/own-script.md
What went wrong, if anything did: docker compose run --rm trainer report"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    rank: int
    command: Sequence[str]
    environment: Mapping[str, str]
    cleanup: Sequence[str] = ()


def main() -> int:
    run_name = time.strftime("demo-%Y%m%d-%H%M%S")
    print("Two nodes (127.0.0.1, 127.0.0.2) of one process each train a small GPT on this machine.")
    print(f"Checkpoints and logs go to {runs_of(0)} and {runs_of(1)}, in {run_name}/. Ctrl-C stops both.", flush=True)
    missing = missing_engine() or build_image()
    print(f"The nodes are {'two native launchers: ' + missing if missing else 'two compose stacks'}.", flush=True)
    nodes = [native_node(rank, run_name) if missing else compose_node(rank, run_name) for rank in (0, 1)]
    codes = run(nodes)
    for node, code in zip(nodes, codes, strict=True):
        print(f"node {node.rank}: exit code {code}; checkpoints and logs in {runs_of(node.rank) / run_name}")
    if not any(codes):
        print(NEXT)
    return max(codes, key=abs)


def missing_engine() -> str:
    """What is missing for two compose stacks, or nothing."""
    if not shutil.which("docker"):
        return "no docker command is on PATH"
    for command, missing in (
        (["docker", "version", "--format", "{{.Server.Version}}"], "no Docker engine answers"),
        (["docker", "compose", "version", "--short"], "docker has no compose plugin"),
    ):
        if subprocess.run(command, capture_output=True, timeout=30, check=False).returncode != 0:
            return missing
    return ""


def runs_of(rank: int) -> Path:
    return Path(os.environ.get("RUNS_ROOT") or PROJECT / "runs").absolute() / f"node{rank}"


def job(rank: int, run_name: str) -> dict[str, str]:
    # An empty value is unset: what a user's own .env says of a real cluster is not for the demo.
    nothing = {setting.name: "" for setting in TABLE if setting.scope != "compose"}
    return {
        **nothing,
        "IMAGE": "",
        "TRAIN_ARGS": ARGUMENTS,
        # Each node would take all of this machine's processors.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
        **os.environ,
        "NODES": "127.0.0.1,127.0.0.2",
        "NODE_RANK": str(rank),
        "NPROC_PER_NODE": "1",
        "RUN_NAME": run_name,
        "HARDWARE": "cpu",
    }


def native_node(rank: int, run_name: str) -> Node:
    return Node(
        rank=rank,
        command=[sys.executable, str(PROJECT / "entrypoint.py")],
        environment={**job(rank, run_name), "RUNS_ROOT": str(runs_of(rank))},
    )


def compose_node(rank: int, run_name: str) -> Node:
    folder = runs_of(rank)
    folder.mkdir(parents=True, exist_ok=True)
    user = f"{os.getuid()}:{os.getgid()}"
    compose = ["docker", "compose", "--project-directory", str(PROJECT), "-p", f"{run_name}-node{rank}"]
    return Node(
        rank=rank,
        command=[
            *compose,
            "--ansi",
            "never",
            "up",
            "--no-build",
            "--no-log-prefix",
            "--exit-code-from",
            "trainer",
            "trainer",
        ],
        environment={**job(rank, run_name), "RUNS": str(folder), "RUNS_ROOT": "", "RUN_AS": user},
        cleanup=[*compose, "down", "--timeout", "60"],
    )


def build_image() -> str:
    """Build the image that both stacks use; returns what went wrong, or nothing."""
    print("Building the image; the first time this takes some minutes, and its steps are shown.", flush=True)
    command = ["docker", "compose", "--project-directory", str(PROJECT), "build", "trainer"]
    built = subprocess.run(command, env={"IMAGE": "", **os.environ, "HARDWARE": "cpu"}, check=False).returncode == 0
    return "" if built else "the image could not be built, the reason stands above"


def run(nodes: Sequence[Node]) -> list[int]:
    """Start all nodes, show their output side by side, and wait; Ctrl-C is theirs to handle."""
    children = [
        subprocess.Popen(
            node.command,
            env=node.environment,
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        for node in nodes
    ]

    def forward(number: int, _frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    readers = [
        threading.Thread(target=show, args=(node.rank, child.stdout), daemon=True)
        for node, child in zip(nodes, children, strict=True)
    ]
    for reader in readers:
        reader.start()
    try:
        return [child.wait() for child in children]
    finally:
        for reader in readers:
            reader.join(timeout=5)
        for node in nodes:
            if node.cleanup:
                subprocess.run(node.cleanup, env=node.environment, capture_output=True, timeout=120, check=False)


def show(rank: int, output: IO[str] | None) -> None:
    for line in output or ():
        print(f"node {rank} | {line}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
