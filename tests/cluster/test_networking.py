"""The right network is found and used: bytes counted on interfaces of real nodes with several of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest

from tests.testbed import BedError, Cluster, Node, network
from tests.testbed.shell import run

# A model of about 3 MB of gradients, so that four steps outweigh everything else on the wire.
SHORT = "--steps 4 --layers 4 --width 128 --heads 2 --batch 2 --sample 0 --eval-every 0"
GRADIENTS = 4_000_000
CHATTER = 400_000


@pytest.fixture
def wires(cluster2: Cluster) -> Iterator[Cluster]:
    """Two nodes whose additional interfaces are taken away afterwards."""
    before = {node.name: interfaces(node) for node in cluster2.nodes}
    try:
        yield cluster2
    finally:
        for node in cluster2.nodes:
            for name in interfaces(node) - before[node.name]:
                # The end of one device may have taken another with it.
                with contextlib.suppress(BedError):
                    run(["ip", "-n", node.name, "link", "del", name])
        network.remove_link(f"{cluster2.name}m")


def interfaces(node: Node) -> set[str]:
    return {link["ifname"] for link in json.loads(node.shell("ip", "-j", "link"))}


def moved(bed: Cluster, name: str) -> list[int]:
    return [network.bytes_moved(node.name, name) for node in bed.nodes]


def add_management(bed: Cluster, name: str = "eno1") -> None:
    """A second, slower network on every node, with a switch of its own: on one switch each card answers for both."""
    network.add_bridge(f"{bed.name}m")
    for node in bed.nodes:
        outside = node.add_interface(name, f"10.88.0.{node.index + 1}/24", bridge=f"{bed.name}m")
        network.slow(node.name, name, outside, "20mbit")


def add_same_bridges(bed: Cluster) -> None:
    """What a container engine makes: bridges with the same addresses on every node."""
    for node in bed.nodes:
        for name, address in (("br-0123456789ab", "172.18.0.1/16"), ("virbr0", "192.168.122.1/24")):
            node.add_device(name, "bridge", address=address)


def train(bed: Cluster, nodes: str) -> None:
    stacks = [node.up({"NODES": nodes, "NPROC_PER_NODE": "1", "TRAIN_ARGS": SHORT}) for node in bed.nodes]
    codes = [stack.wait(240) for stack in stacks]
    assert codes == [0, 0], "\n".join(stack.tail() for stack in stacks)


def explained(node: Node, nodes: str) -> dict[str, str]:
    """Values that `explain` gives on a node, by name."""
    done = node.run("explain", "--json", env={"NODES": nodes})
    assert done.code == 0, done.output
    decisions = json.loads(done.output[done.output.index("{") :])["decisions"]
    return {decision["name"]: decision["value"] for decision in decisions}


def test_training_runs_over_the_listed_network_and_not_over_slower_or_container_ones(wires: Cluster) -> None:
    add_management(wires)
    add_same_bridges(wires)
    names = {node.interface for node in wires.nodes}
    assert len(names) == 2, "the nodes' cards have different names"
    fabric, others = [node.bytes_moved() for node in wires.nodes], moved(wires, "eno1")
    train(wires, wires.addresses)
    assert all(node.bytes_moved() - was > GRADIENTS for node, was in zip(wires.nodes, fabric, strict=True))
    assert all(now - was < CHATTER for now, was in zip(moved(wires, "eno1"), others, strict=True))
    assert all(count < CHATTER for count in moved(wires, "br-0123456789ab"))


def test_the_slower_network_is_used_if_it_is_the_one_that_is_listed(wires: Cluster) -> None:
    add_management(wires)
    add_same_bridges(wires)
    fabric = [node.bytes_moved() for node in wires.nodes]
    train(wires, "10.88.0.1,10.88.0.2")
    assert all(count > GRADIENTS for count in moved(wires, "eno1"))
    assert all(node.bytes_moved() - was < CHATTER for node, was in zip(wires.nodes, fabric, strict=True))


def test_an_administrators_bridge_over_a_card_counts(wires: Cluster) -> None:
    for node in wires.nodes:
        node.add_interface("eno2", f"10.90.0.{node.index + 1}/24")
        node.add_device("br0", "bridge", address=f"10.89.0.{node.index + 1}/24")
        run(["ip", "-n", node.name, "addr", "flush", "dev", "eno2"])
        run(["ip", "-n", node.name, "link", "set", "eno2", "master", "br0"])
    train(wires, "10.89.0.1,10.89.0.2")
    assert all(count > GRADIENTS for count in moved(wires, "br0"))


@pytest.mark.parametrize("kind", ["macvlan", "vlan", "bond"])
def test_training_runs_over_an_interface_that_stands_on_another(kind: str, wires: Cluster) -> None:
    name = {"macvlan": "fabric0", "vlan": "fabric.100", "bond": "bond0"}[kind]
    for node in wires.nodes:
        made = {"macvlan": make_macvlan, "vlan": make_vlan, "bond": make_bond}[kind]
        try:
            made(node, name)
        except BedError as error:
            if "Unknown device type" in str(error):
                pytest.skip(f"this machine's kernel has no {kind} devices, so nothing was shown about them")
            raise
    train(wires, "10.91.0.1,10.91.0.2")
    assert all(count > GRADIENTS for count in moved(wires, name))


def make_macvlan(node: Node, name: str) -> None:
    address = f"10.91.0.{node.index + 1}/24"
    node.add_device(name, "macvlan mode bridge", "link", node.interface, address=address)


def make_vlan(node: Node, name: str) -> None:
    address = f"10.91.0.{node.index + 1}/24"
    node.add_device(name, "vlan id 100", "link", node.interface, address=address)


def make_bond(node: Node, name: str) -> None:
    node.add_device(name, "bond mode active-backup miimon 100", address=f"10.91.0.{node.index + 1}/24")
    for port in ("port0", "port1"):
        node.add_interface(port, f"10.92.{node.index}.1/24")
        run(["ip", "-n", node.name, "addr", "flush", "dev", port])
        run(["ip", "-n", node.name, "link", "set", port, "down"])
        run(["ip", "-n", node.name, "link", "set", port, "master", name])


def test_two_nodes_train_over_ipv6(wires: Cluster) -> None:
    try:
        for node in wires.nodes:
            address = f"fd77::{node.index + 1}/64"
            run(["ip", "-n", node.name, "addr", "add", address, "dev", node.interface, "nodad"])
        train(wires, "fd77::1,fd77::2")
    finally:
        for node in wires.nodes:
            with contextlib.suppress(BedError):
                run(["ip", "-n", node.name, "addr", "del", f"fd77::{node.index + 1}/64", "dev", node.interface])


def test_explain_in_the_container_names_this_nodes_card(wires: Cluster) -> None:
    add_management(wires)
    add_same_bridges(wires)
    for rank, node in enumerate(wires.nodes):
        found = explained(node, wires.addresses)
        assert (found["NODE_RANK"], found["interface"]) == (str(rank), node.interface)
        assert found["NCCL_SOCKET_IFNAME"] == f"={node.interface}"
        assert found["GLOO_SOCKET_IFNAME"] == node.interface


def test_a_node_whose_only_match_is_a_container_bridge_is_refused(wires: Cluster) -> None:
    add_same_bridges(wires)
    done = wires.nodes[0].run("explain", env={"NODES": "172.18.0.1,10.99.0.2"})
    assert done.code == 2
    assert "none of these is an address of this machine" in done.output
    assert "br-0123456789ab 172.18.0.1 (container network, the same on every machine)" in done.output
