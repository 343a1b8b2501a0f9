"""Random faults on four nodes for some minutes: each heals, the right node is blamed, no step is lost or doubled.

make soak MINUTES=20            # or SOAK_SEED=123 to have the same faults again

Not among them: a full disk and a lack of memory, which this testbed cannot bring about for one node alone.
"""

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest

from tests.cluster.faults import AGENT, ENTRYPOINT, SAID, WORKER, heard
from tests.cluster.test_training_kills import FROM_0, RESUMED, Training, pids, power_cut, send
from tests.testbed import Cluster
from tests.testbed.shell import until

NODES = (0, 1, 2, 3)
SECONDS = 60 * float(os.environ.get("SOAK_MINUTES", "20"))
QUIET = 10.0
"""Seconds that a fault lasts after which nothing may have happened."""
RESTARTS = r"All nodes start again|was lost: "
BLAMED = re.compile(SAID + r"node (\d+) ")
LEFT_BEHIND = 15.0
"""Seconds within which processes of an earlier round must be gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is done to one node, and what must follow."""

    name: str
    act: Callable[[Training, int], Callable[[], None]]
    """Looks up the processes first, which takes a moment, and returns the act."""
    restarts: bool = True


def to_rank(number: signal.Signals) -> Callable[[Training, int], Callable[[], None]]:
    def prepare(training: Training, index: int) -> Callable[[], None]:
        return partial(send, number, [training.chance.choice(pids(training.stacks[index], WORKER))])

    return prepare


def to_all(pattern: str) -> Callable[[Training, int], Callable[[], None]]:
    return lambda training, index: partial(send, signal.SIGKILL, pids(training.stacks[index], pattern))


def docker_kill(training: Training, index: int) -> Callable[[], None]:
    def act() -> None:
        training.stacks[index].kill()
        training.stacks[index].start()

    return act


def engine_dies(training: Training, index: int) -> Callable[[], None]:
    return partial(power_cut, training.bed.nodes[index], training.stacks[index])


def cut_for(seconds: float) -> Callable[[Training, int], Callable[[], None]]:
    def prepare(training: Training, index: int) -> Callable[[], None]:
        def act() -> None:
            training.bed.nodes[index].cut()
            time.sleep(seconds)
            training.bed.nodes[index].restore()

        return act

    return prepare


def slow_link(training: Training, index: int) -> Callable[[], None]:
    def act() -> None:
        training.bed.nodes[index].slow("20mbit")
        time.sleep(QUIET)
        training.bed.nodes[index].restore()

    return act


def pause(pattern: str, seconds: float) -> Callable[[Training, int], Callable[[], None]]:
    def prepare(training: Training, index: int) -> Callable[[], None]:
        found = pids(training.stacks[index], pattern)

        def act() -> None:
            send(signal.SIGSTOP, found)
            time.sleep(seconds)
            send(signal.SIGCONT, found)

        return act

    return prepare


FAULTS = (
    Fault(name="SIGKILL to a rank", act=to_rank(signal.SIGKILL)),
    Fault(name="SIGSEGV to a rank", act=to_rank(signal.SIGSEGV)),
    Fault(name="SIGABRT to a rank", act=to_rank(signal.SIGABRT)),
    Fault(name="SIGKILL to all ranks of a node", act=to_all(WORKER)),
    Fault(name="SIGKILL to torchrun", act=to_all(AGENT)),
    Fault(name="SIGKILL to the launcher", act=to_all(ENTRYPOINT)),
    Fault(name="docker kill, started again", act=docker_kill),
    Fault(name="power cut, started again", act=engine_dies),
    Fault(name="link cut for 20 s", act=cut_for(20)),
    Fault(name="launcher stopped by SIGSTOP for 20 s", act=pause(ENTRYPOINT, 20)),
    Fault(name="link cut for 3 s", act=cut_for(3), restarts=False),
    Fault(name="link at 20 Mbit/s", act=slow_link, restarts=False),
    Fault(name="a rank stopped by SIGSTOP", act=pause(WORKER, QUIET), restarts=False),
)


def blamed(training: Training, victim: int) -> set[int]:
    """Whom the surviving nodes named as they started again."""
    found = set()
    for index, stack in enumerate(training.stacks):
        if index == victim:
            continue
        _, line = heard(stack, RESTARTS, training.since, 90)
        named = BLAMED.search(line)
        assert named, line
        found.add(int(named[1]))
    return found


def restarts(training: Training) -> int:
    """How often any node has said that all start again."""
    return sum(len(re.findall(RESTARTS, stack.logs())) for stack in training.stacks)


def one_round_runs(training: Training) -> bool:
    """No process of an earlier round is left anywhere."""
    return all(len(pids(stack, AGENT)) == 1 and len(pids(stack, WORKER)) == 1 for stack in training.stacks)


def strike(training: Training, fault: Fault) -> str:
    """One fault at a random moment on a random node; the table's row."""
    victim = training.chance.choice(NODES)
    act, told = fault.act(training, victim), restarts(training)
    training.to_a_random_step()
    training.since, before = time.time(), training.step()
    act()
    row = f"{fault.name:38} node {victim} after step {before:5}"
    if not fault.restarts:
        until(lambda: training.step() > before + 1, deadline=60, what="the next steps")
        assert restarts(training) == told
        return f"{row}: goes on"
    named = blamed(training, victim)
    assert named == {victim}, f"{row}: blamed {named}"
    first = training.stacks[0 if victim else 1]
    heard(first, f"{RESUMED}|{FROM_0}|round \\d+: ", training.since, 120)
    # Steps after the last checkpoint are done again: the step that was interrupted is reached once more.
    until(lambda: training.step() > before, deadline=120, what=f"a step after {before}")
    took = time.time() - training.since
    until(lambda: one_round_runs(training), deadline=LEFT_BEHIND, what="the processes of the last round to end")
    return f"{row}: beyond it after {took:4.1f} s"


@pytest.mark.timeout(SECONDS + 1200)
def test_random_faults_heal_with_the_right_culprit_and_one_sequence_of_losses(cluster4: Cluster) -> None:
    seed = int(os.environ.get("SOAK_SEED") or time.time_ns() % 1_000_000)
    print(f"\nSOAK_SEED={seed}")
    training = Training(cluster4, random.Random(seed))
    training.up(NODES, nproc=1)
    training.goes_on_after(0)
    until_then, told = time.monotonic() + SECONDS, Counter[str]()
    while time.monotonic() < until_then:
        fault = training.chance.choice(FAULTS)
        print(strike(training, fault), flush=True)
        told[fault.name] += 1
    training.stacks[0].stop()
    losses: dict[int, set[float]] = {}
    for record in training.records():
        losses.setdefault(record["step"], set()).add(record["loss"])
    assert set(losses) == set(range(1, max(losses) + 1)), "a step is missing"
    assert not {step: values for step, values in losses.items() if len(values) > 1}
    print(f"{told.total()} faults of {len(told)} kinds, {max(losses)} steps, each with one loss")
