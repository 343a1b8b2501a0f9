"""The bench on four nodes with links of a known speed: the one with a slow link is named, a healthy cluster is not.

Every node in turn has native ranks between real wires: what is tested is the verdict. `bench` as users run it, in
containers, names the slow node once.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.testbed import Cluster, Finished, Node, network

PROJECT = Path(__file__).resolve().parents[2]
NODES = 4
PREFIX = f"tb{os.getpid()}"[:9]
# Well below what two cores can push, so that the wires are the limit and not the machine.
SPEED, TENTH = "400mbit", "40mbit"


def node(index: int) -> tuple[str, str, str]:
    """Namespace, its interface, and the bridge's port of a node."""
    return f"{PREFIX}n{index}", f"ens{index}", f"{PREFIX}p{index}"


@pytest.fixture
def wires() -> Iterator[None]:
    network.add_bridge(PREFIX)
    try:
        for index in range(NODES):
            namespace, interface, port = node(index)
            network.add_namespace(namespace)
            address = f"10.78.0.{index + 1}/24"
            network.add_link(netns=namespace, bridge=PREFIX, interface=interface, address=address, outside=port)
            network.slow(namespace, interface, port, SPEED)
        yield
    finally:
        for index in range(NODES):
            network.remove_namespace(node(index)[0])
            with contextlib.suppress(Exception):
                network.remove_link(node(index)[2])
        network.remove_link(PREFIX)


def bench(run_dir: Path) -> dict[str, object]:
    ranks = []
    for index in range(NODES):
        namespace, interface, _ = node(index)
        environment = {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "RUN_DIR": str(run_dir),
            "GLOO_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": "1",
            "RANK": str(index),
            "WORLD_SIZE": str(NODES),
            "LOCAL_RANK": "0",
            "GROUP_RANK": str(index),
            "GROUP_WORLD_SIZE": str(NODES),
            "NODES": ",".join(f"10.78.0.{number + 1}" for number in range(NODES)),
            "MASTER_ADDR": "10.78.0.1",
            "MASTER_PORT": "29400",
        }
        command = [sys.executable, "-m", "app.bench", "--seconds", "4", "--largest", "16K"]
        inside = ["nsenter", f"--net=/run/netns/{namespace}", *command]
        ranks.append(subprocess.Popen(inside, cwd=run_dir, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * NODES, outputs
    found: dict[str, object] = json.loads((run_dir / "bench" / "result.json").read_text())
    return found


@pytest.mark.usefixtures("wires")
@pytest.mark.parametrize("slow", range(NODES))
def test_the_node_whose_link_is_ten_times_slower_is_named_and_no_other(tmp_path: Path, slow: int) -> None:
    network.slow(*node(slow), TENTH)
    found = bench(tmp_path)
    parts = found["slow"]
    assert isinstance(parts, list)
    assert [(part["id"], part["nodes"], part["way"]) for part in parts] == [("slow-node", [slow], "sends and receives")]
    assert found["good"] is False


@pytest.mark.usefixtures("wires")
def test_four_equal_links_give_no_alarm(tmp_path: Path) -> None:
    found = bench(tmp_path)
    assert found["slow"] == []
    assert found["good"] is True


def test_bench_on_four_engines_names_the_slow_node_and_keeps_its_figures(cluster4: Cluster) -> None:
    for node in cluster4.nodes:
        node.slow(SPEED)
    cluster4.nodes[2].slow(TENTH)
    env = {"NODES": cluster4.addresses, "NPROC_PER_NODE": "1"}

    def bench_on(node: Node) -> Finished:
        return node.run("bench", "--seconds", "6", "--largest", "16K", env=env)

    with ThreadPoolExecutor(len(cluster4.nodes)) as pool:
        done = list(pool.map(bench_on, cluster4.nodes))
    assert [each.code for each in done] == [0] * NODES, "\n".join(each.output for each in done)
    slow = [line for line in done[0].output.splitlines() if "slowly" in line]
    assert len(slow) == 1, done[0].output
    assert f"node 2 ({cluster4.nodes[2].address}) sends and receives slowly" in slow[0]
    assert "/runs/default/bench/result.json, bandwidth.png" in done[0].output
