"""Faults while the training runs, on real engines: known on all nodes in seconds, one culprit, no process left behind.

The tests of this file share one job of two nodes that goes from fault to fault, as a long training does; each test
starts from a job that trains, a new one if the last test broke it.
"""

import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.cluster.faults import (
    AGENT,
    ENTRYPOINT,
    PRELOADED,
    TRAINS,
    WORKER,
    Table,
    all_hear,
    codes,
    ends,
    heard,
    up,
    verdict,
)
from tests.testbed import Cluster, Stack
from tests.testbed.shell import until

SOON, SECONDS = 2.0, 10.0
"""How soon all nodes must know: of a worker's failure, and of a lost node. Docker's log and this machine add to it."""
SLACK = 2.0


@dataclass
class Job:
    """Nodes that train."""

    bed: Cluster
    stacks: list[Stack] = field(default_factory=list)
    since: float = 0.0
    """When the last fault came."""
    good: bool = False
    """All ranks train, as far as is known."""

    def train(self, count: int = 2, **env: str) -> None:
        """Starts over on `count` nodes, and waits until all ranks train."""
        self.bed.grow(count)
        self.bed.clear()
        self.since = time.time()
        nodes = self.bed.nodes[:count]
        addresses = ",".join(node.address for node in nodes)
        self.stacks = [up(node, addresses, {"REJOIN_TIMEOUT": "60", **env}) for node in nodes]
        self.trains()

    def trains(self, deadline: float = 60) -> float:
        """Seconds from the last fault until all ranks train (again)."""
        took = all_hear(self.stacks, rf"trains: rank \d of {len(self.stacks)}", self.since, deadline)[0]
        self.good = True
        return took

    def fault(self) -> float:
        self.since, self.good = time.time(), False
        return self.since


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    made = Table()
    yield made
    made.write("While the training runs")


@pytest.fixture(scope="module")
def shared(bed: Cluster) -> Job:
    return Job(bed)


@pytest.fixture
def job(shared: Job) -> Job:
    """A job that trains: the last test's, if that left it so."""
    if not shared.good:
        shared.train()
    return shared


def one_culprit(job: Job, table: Table, fault: str, culprit: str, within: float) -> None:
    """All nodes know in time, all name `culprit` alike, and the job trains again."""
    knows, _ = all_hear(job.stacks, r"compose: (a worker on )?node \d \(.*(ended early|failed|was lost)", job.since)
    said = [heard(stack, culprit, job.since)[1] for stack in job.stacks]
    assert len({verdict(line) for line in said}) == 1
    again = job.trains()
    table.add(fault, knows, f"trains again after {again:.1f} s", verdict(said[0]))
    assert knows < within + SLACK
    no_orphans(job)


def no_orphans(job: Job) -> None:
    """On every node one preloaded process, one torchrun and its one worker, and nothing of an earlier round."""
    for stack in job.stacks:
        commands = [*stack.processes().values()]
        for pattern in (PRELOADED, AGENT, WORKER):
            assert len([line for line in commands if re.search(pattern, line)]) == 1, commands


def tells(stack: Stack, health: str) -> None:
    """The engine's own health check prints this; the launcher writes its state anew every five seconds."""
    command = ["python", "/opt/torchrun-compose/entrypoint.py", "healthcheck"]

    def told() -> bool:
        done = stack.container().exec_run(command)
        assert isinstance(done.output, bytes)
        assert done.exit_code == 0, done.output
        return bool(re.match(health, done.output.decode()))

    until(told, deadline=15, what=f"a health check that prints {health!r}")


def test_the_last_node_first_and_node_0_a_minute_later(shared: Job, table: Table) -> None:
    shared.bed.clear()
    first, second = shared.bed.nodes[:2]
    addresses = f"{first.address},{second.address}"
    since = shared.fault()
    waiting = up(second, addresses, {"REJOIN_TIMEOUT": "60"})
    _, line = heard(waiting, rf"waiting 5\d s for node 0, {first.address} port 29401", since, 90)
    since = shared.fault()
    shared.stacks = [up(first, addresses, {"REJOIN_TIMEOUT": "60"}), waiting]
    took = shared.trains()
    table.add("node 0 comes a minute after node 1", None, f"trains {took:.1f} s after it came", verdict(line))


def workers(stack: Stack) -> list[str]:
    return [line for line in stack.processes().values() if "worker.py" in line]


def test_a_worker_raises(job: Job, table: Table) -> None:
    job.fault()
    assert job.stacks[1].signal(WORKER, signal.SIGUSR1) == 1
    one_culprit(job, table, "a worker raises", r"node 1 \(.*rank 1 failed with ValueError: bad batch", SOON)


def test_a_worker_is_killed(job: Job, table: Table) -> None:
    job.fault()
    assert job.stacks[1].signal(WORKER) == 1
    one_culprit(job, table, "SIGKILL to a worker", r"node 1 \(.*rank 1 was ended by SIGKILL", SOON)


def test_torchrun_is_killed(job: Job, table: Table) -> None:
    job.fault()
    assert job.stacks[1].signal(AGENT) == 1
    one_culprit(job, table, "SIGKILL to torchrun", r"node 1 \(.*torchrun was ended by SIGKILL", SOON)


def test_the_preloaded_process_is_killed_and_another_takes_its_place(job: Job, table: Table) -> None:
    job.fault()
    assert job.stacks[1].signal(PRELOADED) == 1
    one_culprit(job, table, "SIGKILL to the preloaded process", r"node 1 \(.*torchrun was ended by SIGKILL", SOON)


@pytest.mark.parametrize("victim", [1, 0])
def test_the_entrypoint_is_killed_and_docker_brings_it_back(job: Job, table: Table, victim: int) -> None:
    survivor = job.stacks[1 - victim]
    before = job.stacks[victim].restarts
    job.fault()
    assert job.stacks[victim].signal(ENTRYPOINT) >= 1
    knows, line = heard(survivor, rf"node {victim} \(.*was lost", job.since)
    again = job.trains()
    no_orphans(job)
    assert job.stacks[victim].restarts == before + 1
    table.add(f"SIGKILL to the entrypoint of node {victim}", knows, f"trains again after {again:.1f} s", verdict(line))
    assert knows < SECONDS


@pytest.mark.parametrize("victim", [1, 0])
def test_a_container_is_killed_and_started_again(job: Job, table: Table, victim: int) -> None:
    survivor = job.stacks[1 - victim]
    job.fault()
    job.stacks[victim].kill()
    knows, line = heard(survivor, rf"node {victim} \(.*was lost", job.since)
    assert not job.stacks[victim].processes()
    job.stacks[victim].start()
    again = job.trains()
    no_orphans(job)
    table.add(
        f"`docker kill` on node {victim}, started again", knows, f"trains again after {again:.1f} s", verdict(line)
    )
    assert knows < SECONDS


def test_a_link_cut_for_five_seconds_goes_unnoticed(job: Job, table: Table) -> None:
    job.fault()
    job.bed.nodes[1].cut()
    time.sleep(5)
    job.bed.nodes[1].restore()
    time.sleep(6)
    for stack in job.stacks:
        since = stack.container().logs(since=int(job.since)).decode()
        assert "was lost" not in since
        assert "is not heard" not in since
        assert "ending the workers" not in since
    job.good = True
    table.add("link cut for 5 s", None, "goes on training", "nothing")


def test_a_link_cut_for_good_and_restored_later(job: Job, table: Table) -> None:
    job.fault()
    job.bed.nodes[1].cut()
    knows, line = all_hear(job.stacks, r"node \d \(.*(was lost|is not heard)", job.since)
    until(lambda: not any(workers(stack) for stack in job.stacks), deadline=8, what="the end of all workers")
    table.add("link cut for good", knows, "no worker is left on either side", verdict(line))
    assert knows < SECONDS + SLACK
    job.fault()
    job.bed.nodes[1].restore()
    again = job.trains()
    table.add("the same link restored", None, f"trains again after {again:.1f} s", "round with all nodes")


def test_node_0_whose_own_link_is_cut_suspects_itself(job: Job, table: Table) -> None:
    """Of three nodes: who hears nobody any more says so, and the others say whom they miss."""
    job.train(3)
    since = job.fault()
    job.bed.nodes[0].cut()
    knows, line = heard(job.stacks[0], r"node 0 \(\S+\) no longer hears any other node: its (own )?link \S+ is", since)
    assert not re.search(r"node [12] \(\S+\) was lost", job.stacks[0].container().logs(since=int(since)).decode())
    missed, _ = all_hear(job.stacks[1:], r"node 0 \(\S+\) was lost", since)
    job.fault()
    job.bed.nodes[0].restore()
    again = job.trains()
    table.add("the link of node 0 of 3 cut", max(knows, missed), f"trains again after {again:.1f} s", verdict(line))
    job.good = False


def test_all_containers_are_killed_and_started_again(job: Job, table: Table) -> None:
    job.fault()
    for stack in job.stacks:
        stack.kill()
    for stack in job.stacks:
        stack.start()
    again = job.trains()
    table.add("all containers killed, all started again", None, f"trains again after {again:.1f} s", "a new gang")


@pytest.mark.parametrize("stopped", [1, 0])
def test_docker_compose_stop_lets_all_scripts_save(job: Job, table: Table, stopped: int) -> None:
    before = [stack.restarts for stack in job.stacks]
    since = job.fault()
    job.stacks[stopped].stop()
    knows, line = all_hear(job.stacks, f"stopped on node {stopped}", since)
    found = codes(job.stacks)
    for stack in job.stacks:
        heard(stack, "saved", since)
        assert not stack.processes()
    assert found[stopped] == 143
    assert found[1 - stopped] == 0
    assert [stack.restarts for stack in job.stacks] == before
    table.add(f"`docker compose stop` on node {stopped}", knows, ends(found), verdict(line))


@pytest.mark.parametrize(("stopped", "says"), [(0, "stopped on node 0"), (1, "stopped before the training was done")])
def test_a_stop_while_the_gang_waits_for_a_lost_node(job: Job, table: Table, stopped: int, says: str) -> None:
    tells(job.stacks[stopped], r"running, round \d+, last progress: step \d+")
    job.fault()
    job.stacks[1 - stopped].kill()
    heard(job.stacks[stopped], rf"waiting \d+ s for node {1 - stopped}", job.since)
    tells(job.stacks[stopped], r"waiting, round \d+, last progress: step \d+")
    since = job.fault()
    job.stacks[stopped].stop()
    knows, line = heard(job.stacks[stopped], says, since)
    found = [job.stacks[stopped].wait()]
    assert found == [143]
    table.add(f"`docker compose stop` on node {stopped} while restarting", knows, ends(found), verdict(line))


def test_an_engine_is_stopped(job: Job, table: Table) -> None:
    since = job.fault()
    job.bed.nodes[1].stop_engine()
    knows, line = heard(job.stacks[0], "stopped on node 1", since)
    found = [job.stacks[0].wait()]
    job.bed.nodes[1].start_engine()
    assert found == [0]
    table.add("engine of node 1 stopped (`systemctl stop docker`)", knows, ends(found), verdict(line))


def test_a_power_cut(job: Job, table: Table) -> None:
    """The node's cable goes first, so no packet says goodbye; nobody brings it back within REJOIN_TIMEOUT."""
    job.train(REJOIN_TIMEOUT="5")
    since = job.fault()
    job.bed.nodes[1].crash()
    knows, line = heard(job.stacks[0], r"node 1 \(.*(was lost|is not heard)", since)
    found = [job.stacks[0].wait()]
    table.add("power cut of node 1, never back (REJOIN_TIMEOUT=5)", knows, ends(found), verdict(line))
    assert knows < SECONDS + SLACK
    assert found == [6]


def test_min_nodes_goes_on_without_a_lost_node_and_takes_it_back(job: Job, table: Table) -> None:
    job.train(3, REJOIN_TIMEOUT="4", MIN_NODES="2", REGROW="failure")
    first, lost, last = job.stacks
    since = job.fault()
    lost.kill()
    knows, line = all_hear([first, last], "going on without node 1", since)
    alone, _ = heard(last, "trains: rank 1 of 2", since)
    no_orphans(Job(job.bed, [first, last]))
    told = f"trains on two nodes after {alone:.1f} s, node 2 as rank 1"
    table.add("node 1 of 3 never returns (MIN_NODES=2, REJOIN_TIMEOUT=4)", knows, told, verdict(line))
    since = job.fault()
    lost.start()
    knows, line = heard(lost, "runs without this node; it joins the next one", since)
    assert first.signal(WORKER) == 1
    again = job.trains()
    for rank, stack in enumerate(job.stacks):
        heard(stack, f"trains: rank {rank} of 3", since)
    table.add("node 1 returns; the next failure", knows, f"trains on all three after {again:.1f} s", verdict(line))


def test_three_failures_in_a_row_end_the_job(bed: Cluster, table: Table) -> None:
    job = Job(bed)
    bed.clear()
    # Another error each time: the same one twice ends the job earlier.
    fails = TRAINS.replace(
        "    if step % 20 == 3:",
        "    if step == 2 and dist.get_rank() == 1:\n"
        '        raise type(f"Error{time.time_ns()}", (ValueError,), {})("bad batch")\n'
        "    if step % 20 == 3:",
    )
    assert fails != TRAINS
    since = job.fault()
    addresses = ",".join(node.address for node in bed.nodes[:2])
    job.stacks = [up(node, addresses, {"MAX_RESTARTS": "2"}, script=fails) for node in bed.nodes[:2]]
    knows, line = all_hear(job.stacks, "3 failures in a row without a new checkpoint", since, 90)
    found = codes(job.stacks)
    assert found == [5, 5]
    table.add("three failures in a row (MAX_RESTARTS=2)", knows, ends(found), verdict(line))
