"""What the tests of faults share: a small script that trains, clocks on what nodes say, the table in docs/faults.md.

FAULTS_TABLE=docs/faults.md pytest tests/cluster/test_faults_*.py      # writes the table anew
"""

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tests.testbed import BedError, Node, Stack

TRAINS = """
import os, signal, sys, time, torch, torch.distributed as dist
from pathlib import Path

def fail(*_):
    raise ValueError("bad batch")

dist.init_process_group("gloo")
run_id = os.environ["TORCHELASTIC_RUN_ID"]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
signal.signal(signal.SIGUSR1, fail)
for step in range(100000):
    stop = torch.tensor(float(bool(stopped)))
    dist.all_reduce(stop)
    if step % 20 == 3:
        Path(os.environ["RUN_DIR"], "progress").write_text(f"step {step} of {run_id}")
    if step == 3:
        print(f"trains: rank {dist.get_rank()} of {dist.get_world_size()}, {run_id}", flush=True)
    if stop.item():
        print("saved", flush=True)
        sys.exit(143)
    time.sleep(0.05)
"""
# Titles of processes that were forked from the preloaded one, and command lines of those that were not.
WORKER = r"^rank\d+ |^\S+ -u \S*worker\.py"
PRELOADED = r"^torchrun-compose: preloaded"
AGENT = r"^torchrun-compose: torchrun|^\S+ -P \S*agent\.py"
ENTRYPOINT = r"^\S*python\S* \S*entrypoint\.py"
SAID = r"torchrun-compose: "
INTRODUCTION = """# Faults, measured

Written by `tests/cluster/test_faults_*.py`: real Docker engines, the real image, gloo on CPUs, a network namespace per
node, all on one machine of two cores. Seconds are from the fault until the last node has printed it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    fault: str
    knows: float | None
    """Seconds from the fault until the last node printed it; None where there is nothing to know."""
    ends: str
    said: str


@dataclass(slots=True)
class Table:
    rows: list[Row] = field(default_factory=list)

    def add(self, fault: str, knows: float | None, ends: str, said: str) -> None:
        told = re.sub(r"\s+", " ", said).strip()
        row = Row(fault=fault, knows=knows, ends=ends, said=told[:230] + "..." * (len(told) > 230))
        self.rows.append(row)
        print(f"\n{row.fault}: all nodes know after {shown(knows)}; {row.ends}; said: {row.said}", flush=True)

    def write(self, part: str) -> None:
        """Puts the table's part into the file that FAULTS_TABLE names, if it names one."""
        target = os.environ.get("FAULTS_TABLE")
        if not target or not self.rows:
            return
        rows = [
            f"| {row.fault} | {shown(row.knows)} | {row.ends} | {row.said.replace('|', '/')} |" for row in self.rows
        ]
        head = "| fault | all nodes know after | how it ends | what the nodes say |\n|---|---|---|---|"
        path = Path(target)
        old = path.read_text() if path.exists() else INTRODUCTION
        new = "\n".join([f"## {part}", "", head, *rows, ""])
        # In its place, so that a part that is measured alone does not change the order.
        text, found = re.subn(rf"## {part}\n.*?(?=\n## |\Z)", lambda _: new, old, flags=re.DOTALL)
        path.write_text(text if found else f"{old.rstrip()}\n\n{new}")


def shown(knows: float | None) -> str:
    return "-" if knows is None else f"{knows:.1f} s"


def up(
    node: Node,
    nodes: str,
    env: Mapping[str, str] | None = None,
    *,
    script: str = TRAINS,
    files: Mapping[str, str] | None = None,
    project: str = "job",
) -> Stack:
    """`docker compose up` of a node of the job `nodes`."""
    settings = {"NODES": nodes, "NPROC_PER_NODE": "1", "TRAIN_SCRIPT": "/workspace/train.py", "OMP_NUM_THREADS": "1"}
    return node.up({**settings, **(env or {})}, files={"workspace/train.py": script, **(files or {})}, project=project)


def heard(stack: Stack, pattern: str, since: float, deadline: float = 40) -> tuple[float, str]:
    """When after `since` (epoch seconds) the node first printed a line with `pattern`: (seconds, the line)."""
    until = time.time() + deadline
    while True:
        log = stack.container().logs(timestamps=True, since=int(since)).decode(errors="replace")
        for line in log.splitlines():
            stamp, _, said = line.partition(" ")
            at = seconds(stamp)
            if at >= since and re.search(pattern, said):
                return at - since, said
        if time.time() > until:
            raise BedError(f"{stack.engine.name}: no {pattern!r} within {deadline:g} s; its log:\n{stack.tail(30)}")
        time.sleep(0.2)


def all_hear(stacks: Sequence[Stack], pattern: str, since: float, deadline: float = 40) -> tuple[float, str]:
    """The same for several nodes: the last of them, and its line."""
    return max(heard(stack, pattern, since, deadline) for stack in stacks)


def seconds(stamp: str) -> float:
    """Docker's timestamps have nine digits after the point, Python reads six."""
    try:
        return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*Z$", r"\1+00:00", stamp)).timestamp()
    except ValueError:
        return 0.0


def verdict(line: str) -> str:
    return line.partition(SAID)[2] or line


def codes(stacks: Sequence[Stack], deadline: float = 60) -> list[int]:
    return [stack.wait(deadline) for stack in stacks]


def ends(found: Sequence[int]) -> str:
    return "exit codes " + ", ".join(map(str, found))
