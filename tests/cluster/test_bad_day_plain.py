"""What plain torchrun prints on a bad day: the same containers, wires and scripts, started as a shell script does.

Needs BAD_DAY_TABLE, since it waits a minute where torchrun says nothing, and proves nothing of ours: `make bad-days`.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from tests.cluster.bad_day import FULL, SCRIPTS, TABLE, another_image, code, fault_at, stamped, told, torchrun_prints
from tests.cluster.test_doctor import NO_RANDOM_PORTS, firewall
from tests.cluster.test_report_stacks import LIMIT
from tests.cluster.test_testbed import listening
from tests.testbed import BedError, Cluster, Node, Stack

PORT = 29400
LOOK = 60.0
"""Seconds from the fault, or from the start, for which torchrun is watched."""
TELLS = r"\b\w+(Error|Exception): |Signal \d+ \(SIG\w+\)"

Fault = Callable[[Cluster], contextlib.AbstractContextManager[object]]

pytestmark = [
    pytest.mark.skipif(not TABLE, reason="runs for minutes and tests nothing of ours: make bad-days"),
    pytest.mark.timeout(400),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """One bad day of plain torchrun."""

    script: str = "goes_wrong.py nothing"
    ranks: tuple[int, ...] = (0, 1)
    """Node ranks as given on the command lines, in the order of the nodes; a node can have two containers."""
    nodes: int = 2
    each: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """By container: what its environment has more."""
    files: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    override: Mapping[int, str] = field(default_factory=dict)
    """By container: one more compose file."""
    card: bool = True
    """The shell script names each node's network card for Gloo."""
    tells: Mapping[int, str] = field(default_factory=dict)
    """By container: which line is the best that it prints, where the first that looks like an error is not."""
    fault: Fault = contextlib.nullcontext
    lacks_script: int = -1


def closed(index: int, rule: str) -> Fault:
    """A firewall on one node, until the cluster is cleared."""

    @contextlib.contextmanager
    def fault(bed: Cluster) -> Iterator[None]:
        firewall(bed.nodes[index], rule.format(*(node.address for node in bed.nodes)))
        yield

    return fault


@contextlib.contextmanager
def slowed(bed: Cluster) -> Iterator[None]:
    bed.nodes[1].slow("1gbit")
    yield


@contextlib.contextmanager
def narrow(bed: Cluster) -> Iterator[None]:
    node = bed.nodes[1]
    node.shell("ip", "link", "set", node.interface, "mtu", "1400")
    try:
        yield
    finally:
        node.shell("ip", "link", "set", node.interface, "mtu", "1500")


@contextlib.contextmanager
def own_name_on_loopback(bed: Cluster) -> Iterator[None]:
    before = [[(node.engine.home / name).read_text() for name in ("hostname", "hosts")] for node in bed.nodes]
    for node in bed.nodes:
        name = f"gpu-{node.index}"
        node.set_host_name(name, f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    try:
        yield
    finally:
        for node, (name, hosts) in zip(bed.nodes, before, strict=True):
            node.set_host_name(name.strip(), hosts)


DAYS: Mapping[str, Day] = {
    "one way": Day(fault=closed(1, NO_RANDOM_PORTS)),
    "pair": Day(
        nodes=3,
        ranks=(0, 1, 2),
        fault=closed(2, "ip saddr {1} drop"),
    ),
    "slow link": Day(fault=slowed),
    "mtu": Day(fault=narrow),
    "wrong nic": Day(each={0: {"GLOO_SOCKET_IFNAME": "lo"}}),
    "127.0.1.1": Day(card=False, fault=own_name_on_loopback),
    "twin": Day(nodes=3, ranks=(0, 1, 1)),
    "image": Day(each={1: {"IMAGE": "torchrun-compose:another"}}, fault=lambda bed: another_image(bed.nodes[1])),
    "shm": Day(script="goes_wrong.py loader 2", each={1: {"SHM_SIZE": "32mb"}}),
    "disk": Day(script="goes_wrong.py disk 2", override={1: FULL}),
    "not shared": Day(script="goes_wrong.py shards"),
    "exception": Day(script="goes_wrong.py exception 3"),
    "memory": Day(
        script="goes_wrong.py memory 3", override={1: LIMIT}, tells={1: r"Signal 9 \(SIGKILL\)|exitcode: -9"}
    ),
    "hang": Day(script="hang_before_collective.py 2"),
    "other collective": Day(script="other_collective.py 1"),
    "slow rank": Day(script="goes_wrong.py slow 3"),
    "port": Day(fault=lambda bed: listening(bed.nodes[0], PORT)),
    "no script": Day(lacks_script=1, tells={1: "can't open file|No such file"}),
    "import": Day(script="goes_wrong.py import", files={0: {"workspace/preprocessing.py": "def ready(): pass\n"}}),
}


def plain(bed: Cluster, day: Day) -> list[Stack]:
    """torchrun on every node, all its settings on the command line or in the environment."""
    stacks = []
    for place, rank in enumerate(day.ranks):
        node = bed.nodes[min(place, len(bed.nodes) - 1)]
        name, *arguments = day.script.split()
        command = [
            f"--nnodes={day.nodes}",
            "--nproc-per-node=2",
            f"--node-rank={rank}",
            f"--master-addr={bed.nodes[0].address}",
            f"--master-port={PORT}",
            f"/workspace/{name}",
            *arguments,
        ]
        files = {} if place == day.lacks_script else {f"workspace/{name}": (SCRIPTS / name).read_text()}
        stacks.append(start(node, command, day, place, {**files, **day.files.get(place, {})}))
    return stacks


def start(node: Node, command: Sequence[str], day: Day, place: int, files: Mapping[str, str]) -> Stack:
    service = {"trainer": {"entrypoint": ["torchrun"], "command": list(command), "restart": "no"}}
    card = {"GLOO_SOCKET_IFNAME": node.interface} if day.card else {}
    own = {"OMP_NUM_THREADS": "1", "CHECKPOINT_DIR": "/runs/checkpoints", **card, **day.each.get(place, {})}
    more = {"plain.yaml": json.dumps({"services": service}), "fault.yaml": day.override.get(place, "{}\n")}
    env = {**own, "COMPOSE_FILE": "compose.yaml:plain.yaml:fault.yaml"}
    return node.up(env, files={**files, **more}, project=f"plain{place}")


def watch(stacks: Sequence[Stack], since: float) -> None:
    """Until all have ended, or LOOK seconds after the fault, if the script tells of one, else after the start."""
    until = since + LOOK
    fault = 0.0
    while time.time() < until and any(stack.running for stack in stacks):
        time.sleep(0.5)
        if not fault and (fault := fault_or_0(stacks)):
            until = fault + LOOK


def fault_or_0(stacks: Sequence[Stack]) -> float:
    with contextlib.suppress(BedError):
        return fault_at(stacks, 0)
    return 0.0


def found(stack: Stack, pattern: str, since: float) -> tuple[str, str]:
    """The cell with the line that tells, and after how long."""
    for at, line in stamped(stack):
        if re.search(pattern, line):
            return code(line), f"{max(0.0, at - since):.1f} s"
    return ("nothing", f"not within {LOOK:.0f} s") if stack.running else ("nothing, and ends", "-")


@pytest.mark.parametrize("scenario", DAYS)
def test_plain_torchrun_on_a_bad_day(bed: Cluster, scenario: str) -> None:
    day = DAYS[scenario]
    bed.grow(4 if day.nodes > 2 else 2)
    bed.clear()
    used = replace(bed, nodes=bed.nodes[: 3 if scenario == "pair" else 2])
    with day.fault(used):
        since = time.time()
        stacks = plain(used, day)
        watch(stacks, since)
        since = fault_or_0(stacks) or since
        cells = [found(stack, day.tells.get(place, TELLS), since) for place, stack in enumerate(stacks)]
        for stack in stacks:
            print(f"--- {stack.engine.name} {stack.project}\n{stack.tail(60)}")
    torchrun_prints(scenario, told([said for said, _ in cells]), told([after for _, after in cells]))
