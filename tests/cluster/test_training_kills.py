"""One training on two real nodes, each with a disk of its own, is interrupted in every way and differs in no loss.

INTERRUPTIONS=20 KILL_SEED=123 pytest -s tests/cluster/test_training_kills.py

Every way once is 14 interruptions; every run prints the seed of its moments.
"""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.cluster.faults import WORKER, codes, heard
from tests.moments import moments, seed
from tests.testbed import Cluster, Node, Stack
from tests.testbed.shell import until

INTERVAL = 10
INTERRUPTIONS = int(os.environ.get("INTERRUPTIONS", "0"))
"""At least so many."""
# Without an end, so that a fast machine does not come to it between two kills.
FLAGS = (
    f"--steps 1000000 --checkpoint-every {INTERVAL} --log-every 1 --layers 1 --width 32 --heads 2 --context 32 "
    "--batch 8 --sample 0 --eval-every 0"
)
BOTH = (0, 1)
RESUMED = r"resumed after step (\d+); (\d+) logged steps are done again"
FROM_0 = "starting at step 0: no complete checkpoint"
# What happens, and whether it shall happen while a checkpoint is being written.
HOWS = (
    ("SIGKILL to a rank", True),
    ("SIGKILL to a rank", False),
    ("SIGKILL to all ranks of a node", True),
    ("SIGKILL to a container's first process", True),
    ("docker kill", False),
    ("docker kill on both nodes", False),
    ("docker kill on node 0, and its disk is lost", False),
    ("an engine dies with all that it runs", False),
    ("SIGTERM to a rank", False),
    ("docker compose stop", False),
    ("SIGTERM to an engine", False),
)
# Another number of ranks for each of the last: which nodes, and how many ranks on each.
PLACES = (((1,), 1), (BOTH, 1), ((0,), 3))
CONTAINER_DEATHS = ("docker kill", "SIGKILL to a container's first process")
Record = dict[str, Any]


@dataclass
class Training:
    """Nodes that train, and all that they have ever written."""

    bed: Cluster
    chance: random.Random
    stacks: list[Stack] = field(default_factory=list)
    since: float = 0.0
    """When it was started or interrupted last."""
    lost_with_a_disk: list[Record] = field(default_factory=list)
    torn: int = 0
    """Interruptions that left an unfinished checkpoint."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """From each kind of interruption until the next step was done."""

    def up(self, nodes: Sequence[int] = BOTH, nproc: int = 2) -> None:
        chosen = [self.bed.nodes[index] for index in nodes]
        env = {"NODES": ",".join(node.address for node in chosen), "NPROC_PER_NODE": str(nproc), "TRAIN_ARGS": FLAGS}
        # Interruptions closer than a checkpoint's interval are meant here, and are failures without progress.
        env |= {"OMP_NUM_THREADS": "1", "MAX_RESTARTS": "20"}
        self.since = time.time()
        self.stacks = [node.up(env) for node in chosen]

    def records(self) -> list[Record]:
        """Every loss that was ever written; each node 0 writes to its own disk."""
        files = [node.stacks[0].runs / "default/metrics.jsonl" for node in self.bed.nodes if node.stacks]
        return self.lost_with_a_disk + [one for file in files if file.exists() for one in parsed(file.read_bytes())]

    def step(self) -> int:
        """The newest step."""
        with suppress(OSError), (self.stacks[0].runs / "default/metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
            return int((parsed(file.read()) or [{"step": 0}])[-1]["step"])
        return 0

    def goes_on_after(self, step: int) -> float:
        """Seconds from the last interruption until the step after `step` was done."""
        found: list[float] = []

        def done() -> bool:
            found[:] = [one["time"] for one in self.records() if one["step"] == step + 1 and one["time"] > self.since]
            return bool(found)

        until(done, deadline=120, what=f"step {step + 1}")
        return found[0] - self.since

    def go_on(self, how: str, before: int) -> None:
        """Waits for the training to resume, and looks at what was lost."""
        line = heard(self.stacks[0], f"{RESUMED}|{FROM_0}", self.since, 90)[1]
        # Before the first checkpoint there is nothing to resume from, and everything is done again.
        resumed, again = map(int, next(iter(re.findall(RESUMED, line)), (0, before)))
        # A disk that was lost knows nothing of the steps that are done again.
        lost = max(again, before - resumed)
        took = self.goes_on_after(resumed)
        self.seconds.setdefault(how, []).append(took)
        print(f"{how:44} after step {before:4}: {lost:2} steps lost, next step after {took:4.1f} s", flush=True)
        # One interval, and what was done while a save was under way: never beyond the next save, which waits for it.
        assert lost <= (0 if "SIGTERM" in how or "stop" in how else 2 * INTERVAL)

    def to_a_random_step(self) -> None:
        target = self.step() + self.chance.randint(1, 2 * INTERVAL)
        until(lambda: self.step() >= target, deadline=120, what=f"step {target}", every=0.002)

    def interrupt(self, how: str, *, in_a_save: bool) -> int:
        """Does it to a random node at a random moment, and starts again what does not by itself; the step."""
        index = self.chance.randrange(len(self.stacks))
        victim, act = self.stacks[index], prepared(self, how, index)
        self.to_a_random_step()
        old = unfinished(victim)
        if in_a_save:
            until(lambda: bool(unfinished(victim) - old), deadline=120, what="a save that has begun", every=0.0005)
        self.since, before = time.time(), self.step()
        act()
        self.torn += in_a_save and bool(unfinished(victim) - old)
        return before


def parsed(lines: bytes) -> list[Record]:
    """Records with a loss; a line that was cut, by a kill or by our reading, is left out."""
    found: list[Record] = []
    for line in lines.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and "loss" in record]


def unfinished(stack: Stack) -> set[Path]:
    folders = (stack.runs / "default/checkpoints").glob("step-????????")
    return {folder for folder in folders if not (folder / ".metadata").exists()}


def pids(stack: Stack, pattern: str) -> list[int]:
    return [pid for pid, line in stack.processes().items() if re.search(pattern, line)]


def prepared(training: Training, how: str, index: int) -> Callable[[], None]:
    """What makes it happen to the node `index`; processes are looked up now, which takes longer than a save."""
    node, victim = training.bed.nodes[index], training.stacks[index]
    match how:
        case "SIGKILL to a rank":
            return partial(send, signal.SIGKILL, [training.chance.choice(pids(victim, WORKER))])
        case "SIGTERM to a rank":
            return partial(send, signal.SIGTERM, [training.chance.choice(pids(victim, WORKER))])
        case "SIGKILL to all ranks of a node":
            return partial(send, signal.SIGKILL, pids(victim, WORKER))
        case "SIGKILL to a container's first process":
            return partial(send, signal.SIGKILL, pids(victim, "docker-init"))
        case "docker kill":
            return partial(kill, [victim])
        case "docker kill on both nodes":
            return partial(kill, training.stacks)
        case "docker kill on node 0, and its disk is lost":
            return partial(lose_disk, training)
        case "an engine dies with all that it runs":
            return partial(power_cut, node, victim)
        case "docker compose stop":
            return partial(stop, training, victim)
        case "SIGTERM to an engine":
            return partial(restart_engine, node, training.stacks, index)
    raise AssertionError(how)


def send(number: int, processes: Sequence[int]) -> None:
    for pid in processes:
        os.kill(pid, number)


def kill(stacks: Sequence[Stack]) -> None:
    for stack in stacks:
        stack.kill()
    for stack in stacks:
        stack.start()


def lose_disk(training: Training) -> None:
    first = training.stacks[0]
    first.kill()
    training.lost_with_a_disk += parsed((first.runs / "default/metrics.jsonl").read_bytes())
    first.compose("down", "--volumes")
    first.start()


def power_cut(node: Node, stack: Stack) -> None:
    node.crash()
    node.restore()
    node.start_engine()
    stack.start()


def stop(training: Training, victim: Stack) -> None:
    victim.stop()
    codes(training.stacks)
    for stack in training.stacks:
        stack.start()


def restart_engine(node: Node, stacks: Sequence[Stack], index: int) -> None:
    node.stop_engine()
    stacks[1 - index].wait()
    # An engine that is back may start its container by itself.
    node.start_engine()
    for stack in stacks:
        stack.start()


def test_interruptions_of_every_kind_change_no_loss(cluster2: Cluster) -> None:
    print(f"\nKILL_SEED={seed()}")
    training = Training(cluster2, moments())
    training.up()
    fresh = [training.goes_on_after(0)]
    hows = [*HOWS, *training.chance.choices(HOWS, k=max(0, INTERRUPTIONS - len(HOWS) - len(PLACES)))]
    training.chance.shuffle(hows)
    for how, in_a_save in hows:
        training.go_on(how, training.interrupt(how, in_a_save=in_a_save))
    for nodes, nproc in PLACES:
        training.to_a_random_step()
        before = training.step()
        for stack in training.stacks:
            stack.kill()
        training.up(nodes, nproc)
        training.go_on(f"both killed; {nproc} on {len(nodes)} nodes now", before)
    training.to_a_random_step()
    training.stacks[0].stop()
    seen, seen_seconds = training.records(), training.seconds

    cluster2.clear()
    training = Training(cluster2, moments())
    training.up()
    fresh.append(training.goes_on_after(0))
    deaths = [took for how in CONTAINER_DEATHS for took in seen_seconds.get(how, [])]
    print(f"next step after a container's death: {median(deaths):.1f} s (median of {len(deaths)}); ", end="")
    print(f"first step of a fresh start: {' and '.join(f'{took:.1f}' for took in fresh)} s", flush=True)
    last = max(record["step"] for record in seen)
    until(lambda: training.step() >= last, deadline=240, what=f"step {last} of the run in peace")
    reference = {record["step"]: record["loss"] for record in training.records()}
    ours = [record for record in seen if record["world"] == 4]
    assert {record["step"] for record in seen} == set(range(1, last + 1)), "a step is missing"
    assert not [record for record in ours if record["loss"] != reference[record["step"]]]
    others = [record for record in seen if record["world"] != 4]
    assert {record["world"] for record in others} == {1, 2, 3}
    assert [r["loss"] for r in others] == pytest.approx([reference[r["step"]] for r in others], rel=1e-3)
