"""The rules of `entrypoint.py firewall`, loaded in the namespaces of real nodes."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster.faults import codes, up
from tests.testbed import Cluster, Node
from tests.testbed.network import in_namespace

HELD = 41_007
"""A port of the range from which Gloo takes its own."""
OTHER = 8_080
"""A service of the machine that has nothing to do with the job."""
ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == dist.get_world_size()
"""
LISTENS = """
import socket, sys, time
held = [
    socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True) for port in sys.argv[1:]
]
print("listening", flush=True)
time.sleep(120)
"""
DIALS = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2).close()
    print("open")
except OSError:
    print("closed")
"""


def rules_of(node: Node, nodes: str) -> str:
    told = node.run("firewall", env={"NODES": nodes})
    assert told.code == 0, told.output
    # compose has said on stderr what it made.
    return told.output[told.output.index("table inet") :]


def load(node: Node, rules: str) -> None:
    in_namespace(node.engine.tools, node.name, rules)


@pytest.fixture
def guarded(cluster4: Cluster) -> Iterator[Cluster]:
    """Nodes 0 and 1 are a cluster behind their rules; node 2 is a stranger in the same network."""
    nodes = ",".join(node.address for node in cluster4.nodes[:2])
    for node in cluster4.nodes[:2]:
        # Loading them again replaces them.
        for _ in range(2):
            load(node, rules_of(node, nodes))
    try:
        yield cluster4
    finally:
        for node in cluster4.nodes[:2]:
            load(node, "table inet torchrun_compose {}; delete table inet torchrun_compose")


def reached(source: Node, address: str, port: int) -> bool:
    return source.shell("python3", "-c", DIALS, address, str(port)).strip() == "open"


def test_the_nodes_train_and_a_stranger_reaches_no_port_of_the_job_but_every_other(guarded: Cluster) -> None:
    first, second, stranger = guarded.nodes[:3]
    enter = ["nsenter", f"--net=/run/netns/{first.name}"]
    listener = subprocess.Popen(
        [*enter, "python3", "-c", LISTENS, "29400", "29401", str(HELD), str(OTHER)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        ports = (29400, 29401, HELD, OTHER)
        assert {port: reached(second, first.address, port) for port in ports} == dict.fromkeys(ports, True)
        assert {port: reached(stranger, first.address, port) for port in ports} == {
            29400: False,
            29401: False,
            HELD: False,
            OTHER: True,
        }
        # The machine itself: over loopback, and outwards to others.
        assert reached(first, "127.0.0.1", HELD)
    finally:
        listener.kill()
    nodes = f"{first.address},{second.address}"
    assert codes([up(node, nodes, script=ALL_REDUCE) for node in (first, second)]) == [0, 0]


def test_a_node_alone_trains_behind_its_rules(guarded: Cluster) -> None:
    node = guarded.nodes[0]
    stack = node.up({"NPROC_PER_NODE": "2", "TRAIN_SCRIPT": "/workspace/a.py"}, files={"workspace/a.py": ALL_REDUCE})
    assert stack.wait() == 0


def test_the_same_holds_for_nodes_that_are_listed_by_ipv6(cluster4: Cluster) -> None:
    first, second, stranger = cluster4.nodes[:3]
    listed = {node.name: f"fd77::{11 + node.index}" for node in (first, second, stranger)}
    for node in (first, second, stranger):
        node.shell("ip", "addr", "add", f"{listed[node.name]}/64", "dev", node.interface, "nodad")
    rules = rules_of(first, f"{listed[first.name]},{listed[second.name]}")
    listener = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{first.name}", "python3", "-c", LISTENS, "29400", str(OTHER)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        load(first, rules)
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        assert reached(second, listed[first.name], 29400)
        assert not reached(stranger, listed[first.name], 29400)
        assert reached(stranger, listed[first.name], OTHER)
    finally:
        listener.kill()
        load(first, "table inet torchrun_compose {}; delete table inet torchrun_compose")
        for node in (first, second, stranger):
            node.shell("ip", "addr", "del", f"{listed[node.name]}/64", "dev", node.interface)
