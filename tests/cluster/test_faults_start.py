"""Faults before the training: wrong settings, closed ports and strangers, on real engines. Nothing is started then.

Each node's own engine must leave a refused node alone, which only a real restart policy can show.
"""

import time
from collections.abc import Iterator

import pytest

from tests.cluster.bad_day import we_print
from tests.cluster.faults import Table, all_hear, codes, ends, up, verdict
from tests.testbed import Cluster, Stack, network

NOBODY = "10.77.99.99"


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    made = Table()
    yield made
    made.write("Before the training")


def refused(
    table: Table, fault: str, stacks: list[Stack], since: float, pattern: str, code: int, *, bad_day: str = ""
) -> str:
    """All nodes print `pattern` and end with `code` for good; returns the last node's line."""
    knows, line = all_hear(stacks, pattern, since)
    found = codes(stacks)
    assert found == [code] * len(stacks)
    table.add(fault, knows, ends(found), verdict(line))
    if bad_day:
        we_print(bad_day, knows, verdict(line))
    assert not any(stack.processes() for stack in stacks)
    return line


def test_a_rank_that_two_nodes_claim(cluster2: Cluster, table: Table) -> None:
    """With the classic variables, where no list tells a launcher that a rank is not its own."""
    first, second = cluster2.nodes
    classic = {"NODES": "", "NNODES": "3", "MASTER_ADDR": first.address}
    stacks = [up(first, "", {**classic, "NODE_RANK": "0"}), up(second, "", {**classic, "NODE_RANK": "1"})]
    stacks[0].wait_for("2 of 3 nodes connected")
    since = time.time()
    # A folder of its own: on one machine, the second node 1 of a run is refused before it comes here.
    stacks.append(up(second, "", {**classic, "NODE_RANK": "1", "RUN_DIR": "/runs/twin"}, project="twin"))
    line = refused(
        table, "two nodes with NODE_RANK=1", stacks, since, "two nodes say they are node 1", 4, bad_day="twin"
    )
    assert line.count(second.address) == 2


def test_a_node_list_that_differs(cluster2: Cluster, table: Table) -> None:
    first, second = cluster2.nodes
    since = time.time()
    stacks = [up(first, cluster2.addresses), up(second, f"{cluster2.addresses},{NOBODY}")]
    refused(table, "NODES differs on one node", stacks, since, r"NNODES +2 \(node 0\) +3 \(node 1\)", 4)


def test_a_script_that_differs(cluster2: Cluster, table: Table) -> None:
    first, second = cluster2.nodes
    since = time.time()
    stacks = [up(first, cluster2.addresses), up(second, cluster2.addresses, script="print('another')")]
    refused(table, "the training script differs", stacks, since, r"content of /workspace/train\.py +\w+ \(node 0\)", 4)


def test_a_torch_that_differs(cluster2: Cluster, table: Table) -> None:
    """FAKE: the second node's torch of version 9.9.9 is a folder's name that comes first on its path."""
    first, second = cluster2.nodes
    fake = {"workspace/fake-packages/torch-9.9.9.dist-info/METADATA": "Name: torch\nVersion: 9.9.9\n"}
    since = time.time()
    stacks = [up(first, cluster2.addresses)]
    stacks.append(up(second, cluster2.addresses, {"PYTHONPATH": "/workspace/fake-packages"}, files=fake))
    refused(table, "torch of another version", stacks, since, r"torch +\S+ \(node 0\) +9\.9\.9 \(node 1\)", 4)


def test_a_node_that_never_comes(cluster2: Cluster, table: Table) -> None:
    since = time.time()
    stacks = [up(cluster2.nodes[0], cluster2.addresses, {"START_TIMEOUT": "4"})]
    all_hear(stacks, "waiting 2 s for node 1", since)
    line = refused(table, "a node is missing (START_TIMEOUT=4)", stacks, since, r"timed out after 4 s", 3)
    assert cluster2.nodes[1].address in line


@pytest.mark.parametrize(("reject", "why"), [(False, "no answer"), (True, "connection refused")])
def test_a_closed_control_port(cluster2: Cluster, table: Table, *, reject: bool, why: str) -> None:
    first, second = cluster2.nodes
    first.block(29401, reject=reject)
    since = time.time()
    stacks = [
        up(first, cluster2.addresses, {"START_TIMEOUT": "6"}),
        up(second, cluster2.addresses, {"START_TIMEOUT": "6"}),
    ]
    kind = "rejects" if reject else "drops"
    pattern = rf"timed out after \d+ s .START_TIMEOUT. waiting for node (1|0, {first.address} port 29401: .*{why})"
    refused(table, f"a firewall {kind} CONTROL_PORT (START_TIMEOUT=6)", stacks, since, pattern, 3)
    assert f"sudo iptables -I INPUT -p tcp -s {second.address} -j ACCEPT" in stacks[1].logs()


def test_a_firewall_that_opens_nothing_but_the_two_ports(cluster2: Cluster, table: Table) -> None:
    first, second = cluster2.nodes
    closed = 'iifname != "lo" tcp dport { 1024-29399, 29402-65535 } tcp flags & (syn | ack) == syn drop'
    chain = "add chain inet testbed input { type filter hook input priority 0 ; }"
    rules = f"add table inet testbed ; {chain} ; add rule inet testbed input {closed}"
    network.in_namespace(second.engine.tools, second.name, rules)
    since = time.time()
    stacks = [up(node, cluster2.addresses) for node in (first, second)]
    pattern = rf"node 0 \({first.address}\) to node 1 \({second.address}\), port \d+ and \d+: no answer"
    line = refused(table, "only MASTER_PORT and CONTROL_PORT are open", stacks, since, pattern, 3, bad_day="one way")
    assert f"on node 1: sudo iptables -I INPUT -p tcp -s {first.address} -d {second.address} -j ACCEPT" in line


def test_a_wrong_token_and_another_job_do_not_disturb_the_node_that_waits(cluster2: Cluster, table: Table) -> None:
    first, second = cluster2.nodes
    right, wrong = {"token": "0123456789abcdef0123456789abcdef"}, {"token": "fedcba9876543210fedcba9876543210"}
    guarded = {"CLUSTER_TOKEN_FILE": "./token"}
    waiting = up(first, cluster2.addresses, guarded, files=right)
    since = time.time()
    stranger = up(second, cluster2.addresses, guarded, files=wrong)
    pattern = "CLUSTER_TOKEN_FILE differs from that of node 0"
    refused(table, "wrong cluster token", [stranger], since, pattern, 7, bad_day="token")
    stranger.remove()
    since = time.time()
    other = up(second, cluster2.addresses, {**guarded, "RUN_NAME": "other"}, files=right)
    refused(table, "another job holds the port", [other], since, "belongs to another job, run 'default'", 4)
    assert waiting.running
    since = time.time()
    waiting.stop()
    knows, line = all_hear([waiting], "stopped on node 0", since)
    table.add("`docker compose stop` while waiting", knows, ends([waiting.wait()]), verdict(line))


def test_a_node_that_fails_during_the_roll_call_and_comes_again_and_a_stop_on_it(
    cluster2: Cluster, table: Table
) -> None:
    names = f"{cluster2.addresses},{NOBODY}"
    first, second = (up(node, names) for node in cluster2.nodes)
    for stack in (first, second):
        stack.wait_for(f"waiting .* for node 2 \\({NOBODY}\\)", 20)
    since = time.time()
    second.kill()
    knows, line = all_hear([first], rf"waiting .* for node 1 \({cluster2.nodes[1].address}\)", since)
    second.start()
    came, _ = all_hear([first], "2 of 3 nodes connected", since + knows)
    table.add("container killed during the roll call", knows, f"is back after {knows + came:.1f} s", verdict(line))
    since = time.time()
    second.stop()
    knows, line = all_hear([first, second], "stopped on node 1", since)
    found = codes([first, second])
    assert found == [0, 143], "its own user stopped node 1; node 0's engine must not start it again"
    table.add("`docker compose stop` on node 1 while waiting", knows, ends(found), verdict(line))
    assert first.restarts == 0
