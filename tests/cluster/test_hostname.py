"""What a machine calls itself, and what it makes of that name, does not matter: addresses are literal throughout."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.cluster.bad_day import we_print
from tests.cluster.faults import heard
from tests.cluster.test_two_nodes import SHORT, ended_well, up
from tests.testbed import Cluster

LOCALHOST = "127.0.0.1 localhost\n"


@pytest.fixture
def named(cluster2: Cluster) -> Iterator[Cluster]:
    """Two nodes whose names the test may change."""
    before = [(node.engine.home / name).read_text() for node in cluster2.nodes for name in ("hostname", "hosts")]
    yield cluster2
    for index, node in enumerate(cluster2.nodes):
        node.set_host_name(before[2 * index].strip(), before[2 * index + 1])


@pytest.mark.parametrize(
    ("names", "hosts"),
    [
        # Debian's installer writes this line, so that the name resolves without a network.
        (("gpu-a", "gpu-b"), LOCALHOST + "127.0.1.1 {name}\n"),
        (("gpu-a", "gpu-b"), LOCALHOST),
        (("clone", "clone"), LOCALHOST + "127.0.1.1 {name}\n"),
    ],
    ids=["name resolves to 127.0.1.1", "name does not resolve", "both nodes have one name"],
)
def test_two_nodes_train_whatever_their_names_resolve_to(named: Cluster, names: tuple[str, ...], hosts: str) -> None:
    for node, name in zip(named.nodes, names, strict=True):
        node.set_host_name(name, hosts.format(name=name))
    since = time.time()
    stacks = up(named, {"NODES": named.addresses, "NPROC_PER_NODE": "1", "TRAIN_ARGS": SHORT})
    ended_well(stacks)
    assert f"rank 1 of 2, local rank 0, node 1 ({names[1]})" in stacks[1].logs()
    if "127.0.1.1" in hosts:
        we_print("127.0.1.1", *heard(stacks[0], "step 4/4", since))


def test_nodes_listed_by_name_are_resolved_from_the_hosts_file(named: Cluster) -> None:
    lines = "".join(f"{node.address} gpu-{node.index}\n" for node in named.nodes)
    for node in named.nodes:
        # Each machine's own name is on its loopback as well, as Debian has it.
        node.set_host_name(f"gpu-{node.index}", f"{LOCALHOST}127.0.1.1 gpu-{node.index}.local\n{lines}")
    ended_well(up(named, {"NODES": "gpu-0,gpu-1", "NPROC_PER_NODE": "1", "TRAIN_ARGS": SHORT}))
