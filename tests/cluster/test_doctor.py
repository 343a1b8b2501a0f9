"""Doctor on real engines: a sound cluster is green, and each fault comes out at its node with the right sentence."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest

from tests.cluster.bad_day import we_print
from tests.cluster.test_testbed import listening
from tests.testbed import Cluster, Finished, Node, network
from tests.testbed.shell import run

Env = Mapping[str, str]
TOKEN = "0123456789abcdef" * 2
# Only what opens a connection: answers to this node's own connections come in on such ports as well.
NO_RANDOM_PORTS = 'iifname != "lo" tcp dport 32768-60999 tcp flags & (syn | ack) == syn drop'


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What one node's doctor ended with."""

    code: int
    output: str
    seconds: float
    """From the start of the first node's doctor to the end of the last one's."""

    @property
    def table(self) -> list[str]:
        return re.findall(r"^(?:node [0-9?]|doctor:).*$", self.output, re.MULTILINE)

    def bad(self) -> dict[tuple[str, str], str]:
        """{(node, check): what was said} of all that is neither green nor skipped."""
        lines = re.findall(r"^node ([0-9?]) \(.*?\): (\S+) (warn|FAIL): (.*)$", self.output, re.MULTILINE)
        return {(node, check): f"{word}: {text}" for node, check, word, text in lines}

    def hand_in(self, scenario: str, node: str, check: str) -> None:
        """The finding for the table of bad days."""
        we_print(scenario, self.seconds, f"node {node}: {check} {self.bad()[node, check]}", by="doctor")


def doctors(nodes: Sequence[Node], *words: str, each: Sequence[Env] = (), **env: str) -> list[Told]:
    """`docker compose run --rm trainer doctor WORDS` on all `nodes` at once; `each` adds to one node's .env."""
    listed = {"NODES": ",".join(node.address for node in nodes), "NPROC_PER_NODE": "1", **env}

    def one(node: Node, own: Env) -> Finished:
        files = {"secrets/token": own.get("TOKEN", TOKEN)}
        settings = {**listed, "CLUSTER_TOKEN_FILE": "./secrets/token", **own}
        return node.run("doctor", *words, env={k: v for k, v in settings.items() if k != "TOKEN"}, files=files)

    started = time.monotonic()
    with ThreadPoolExecutor(len(nodes)) as pool:
        done = list(pool.map(one, nodes, each or [{}] * len(nodes)))
    for node, finished in zip(nodes, done, strict=True):
        # Shown by pytest with a failure.
        print(f"--- {node.name} ended with {finished.code}\n{finished.output}")
    took = time.monotonic() - started
    return [Told(code=finished.code, output=finished.output, seconds=took) for finished in done]


def firewall(node: Node, rule: str) -> None:
    """Until the node is cleared; `Node.block` knows single ports only."""
    rules = ["add table inet testbed", "add chain inet testbed input { type filter hook input priority 0 ; }"]
    network.in_namespace(node.engine.tools, node.name, " ; ".join([*rules, f"add rule inet testbed input {rule}"]))


@pytest.mark.parametrize("attempt", range(3))
def test_a_sound_cluster_is_green_everywhere_and_all_nodes_say_the_same(cluster2: Cluster, attempt: int) -> None:
    first, second = doctors(cluster2.nodes)
    assert (first.code, second.code) == (0, 0), first.output + second.output
    assert not first.bad(), attempt
    assert first.table == second.table
    assert first.table[-1] == "doctor: 2 nodes, fit to train"
    assert re.search(rf"all-reduce ok: gloo on 2 ranks.*through {cluster2.nodes[0].interface}", first.output)
    assert "shared ok: each node has its own checkpoint folder" in first.output


def test_json_of_a_sound_cluster_is_fit(cluster2: Cluster) -> None:
    told = doctors(cluster2.nodes, "--json")[0]
    content = json.loads(told.output[told.output.index("\n{") :])
    assert (content["fit"], content["verdict"], len(content["nodes"])) == (True, "green", 2)


def test_a_node_that_never_comes_is_a_red_row(cluster2: Cluster) -> None:
    addresses = ",".join(node.address for node in cluster2.nodes)
    (told,) = doctors(cluster2.nodes[:1], "--wait", "4", NODES=addresses)
    assert told.code == 1
    assert re.search(r"waiting \d+ s for node 1", told.output)
    assert "This node never came: connection refused (the machine is up" in told.bad()["1", "present"]


def test_node_0_that_never_comes_is_a_red_row_as_well(cluster2: Cluster) -> None:
    addresses = ",".join(node.address for node in cluster2.nodes)
    (told,) = doctors(cluster2.nodes[1:], "--wait", "4", NODES=addresses)
    assert told.code == 1
    assert "timed out after" in told.bad()["0", "present"]


def test_another_token_is_named_on_both_sides_without_a_wait(cluster2: Cluster) -> None:
    first, second = doctors(cluster2.nodes, each=[{}, {"TOKEN": TOKEN[::-1]}])
    assert (first.code, second.code) == (1, 1)
    assert "CLUSTER_TOKEN_FILE is not that of node 0" in first.bad()["1", "present"]
    assert "CLUSTER_TOKEN_FILE differs from that of node 0" in second.output


def test_random_ports_closed_on_one_node_are_found_one_way_with_the_rule_that_opens_them(cluster2: Cluster) -> None:
    firewall(cluster2.nodes[1], NO_RANDOM_PORTS)
    first, second = doctors(cluster2.nodes)
    assert first.table == second.table
    assert {key for key in first.bad() if key[1] == "reach"} == {("1", "reach")}
    said = first.bad()["1", "reach"]
    assert "cannot connect to it, port" in said
    assert f"sudo iptables -I INPUT -p tcp -s {cluster2.nodes[0].address} -d {cluster2.nodes[1].address}" in said
    assert "node 0 (" in first.output
    assert "reach ok: node 1 connects to it" in first.output


def test_a_link_slowed_ten_times_is_red(cluster2: Cluster) -> None:
    cluster2.nodes[1].slow("1gbit")
    told = doctors(cluster2.nodes)[0]
    # The shaper lets a burst pass at full speed, and bench counts the best message.
    assert re.match(
        r"FAIL: (Sends|Receives) (?:0\.\d|1\.[0-2]) Gb/s (to|from) node 0, \d+ % of the link's 10.0 Gb/s",
        told.bad()["1", "speed"],
    )
    assert {check for _, check in told.bad()} == {"speed"}
    told.hand_in("slow link", "1", "speed")


def test_a_smaller_mtu_on_one_node_is_named(cluster2: Cluster) -> None:
    node = cluster2.nodes[1]
    node.shell("ip", "link", "set", node.interface, "mtu", "1400")
    try:
        told = doctors(cluster2.nodes)[0]
    finally:
        node.shell("ip", "link", "set", node.interface, "mtu", "1500")
    assert list(told.bad()) == [("1", "mtu")]
    assert f"{node.interface} has MTU 1400, but 1500 on node 0" in told.bad()["1", "mtu"]
    assert f"sudo ip link set {node.interface} mtu 1500" in told.bad()["1", "mtu"]
    told.hand_in("mtu", "1", "mtu")


def test_a_path_with_a_smaller_mtu_than_both_ends_is_found(cluster2: Cluster) -> None:
    """The bridge's port stands for a switch: it drops what is larger, and tells nobody."""
    run(["ip", "link", "set", cluster2.nodes[1].port, "mtu", "1300"])
    try:
        told = doctors(cluster2.nodes)[0]
    finally:
        run(["ip", "link", "set", cluster2.nodes[1].port, "mtu", "1500"])
    assert told.code == 1
    assert any("full-size" in text or "Packets of 1500 bytes" in text for text in told.bad().values())


def test_the_wrong_interface_in_the_users_settings_is_red(cluster2: Cluster) -> None:
    told = doctors(cluster2.nodes, each=[{"GLOO_SOCKET_IFNAME": "lo"}, {}])[0]
    assert "GLOO_SOCKET_IFNAME=lo (.env:" in told.bad()["0", "network"]
    assert "the other nodes would try to connect to lo and fail" in told.bad()["0", "network"]
    told.hand_in("wrong nic", "0", "network")


def test_a_rank_that_belongs_to_another_node_is_told_by_both(cluster2: Cluster) -> None:
    first, second = doctors(cluster2.nodes, "--wait", "6", each=[{}, {"NODE_RANK": "0"}])
    assert (first.code, second.code) == (1, 1)
    assert f"but this machine has {cluster2.nodes[1].address} (node 1)" in second.bad()["?", "rank"]
    assert ("1", "present") in first.bad()


def test_small_shared_memory_is_told_with_its_setting(cluster2: Cluster) -> None:
    told = doctors(cluster2.nodes, each=[{}, {"SHM_SIZE": "32mb"}])[0]
    assert list(told.bad()) == [("1", "limits")]
    assert "SHM_SIZE" in told.bad()["1", "limits"]
    told.hand_in("shm", "1", "limits")


def test_settings_that_differ_are_shown_side_by_side(cluster2: Cluster) -> None:
    told = doctors(cluster2.nodes, each=[{"NPROC_PER_NODE": "2"}, {}])[0]
    assert "NPROC_PER_NODE 2 (node 0) 1 (node 1)" in told.bad()["1", "agree"]


def test_a_taken_port_is_named_on_node_0(cluster2: Cluster) -> None:
    with listening(cluster2.nodes[0], 29400):
        told = doctors(cluster2.nodes)[0]
    assert "MASTER_PORT 29400 is taken" in told.bad()["0", "ports"]
    told.hand_in("port", "0", "ports")


def test_a_cut_between_two_of_three_nodes_names_the_pair(cluster4: Cluster) -> None:
    three = replace(cluster4, nodes=cluster4.nodes[:3]).nodes
    firewall(three[2], f"ip saddr {three[1].address} drop")
    told = doctors(three)[0]
    reach = {key: text for key, text in told.bad().items() if key[1] == "reach"}
    assert set(reach) == {("1", "reach"), ("2", "reach")}
    assert f"node 1 ({three[1].address}) cannot connect to it" in reach["2", "reach"]
    assert ("0", "reach") not in told.bad()
    told.hand_in("pair", "2", "reach")


def test_one_slow_node_of_three_is_named_and_the_others_are_not(cluster4: Cluster) -> None:
    three = replace(cluster4, nodes=cluster4.nodes[:3]).nodes
    three[1].slow("1gbit")
    told = doctors(three)[0]
    assert {key for key in told.bad() if key[1] == "speed"} == {("1", "speed")}
