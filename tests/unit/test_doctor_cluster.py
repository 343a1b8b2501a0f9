"""What is concluded from what the nodes measured together."""

import json
from dataclasses import replace

import pytest

from app.doctor.cluster_checks import judge
from app.doctor.findings import Finding, Row, Severity, green, wrong
from app.doctor.results import Measured, NodeResults
from app.gang.messages import read_facts


def node(rank: int, **changes: object) -> NodeResults:
    known = NodeResults(
        rank=rank,
        address=f"10.0.0.{rank + 1}",
        host=f"gpu-{rank}",
        interface=f"eth{rank}",
        mtu=9000,
        transport="sockets",
        facts={"torch": "2.13.0", "RUN_NAME": "default"},
        findings=(green("rank", "found"),),
    )
    return replace(known, **changes)  # type: ignore[arg-type]  # mypy does not check replace with a dict


def cluster(count: int, **all_nodes: object) -> Measured:
    """A sound cluster: every pair connects, is fast, passes full-size packets."""
    nodes = {rank: node(rank, **all_nodes) for rank in range(count)}
    ordered = {(one, two) for one in nodes for two in nodes if one != two}
    return Measured(
        nodes=nodes,
        listed=tuple(each.address for each in nodes.values()),
        tried=set(ordered),
        packets=dict.fromkeys(ordered, "passes"),
        offsets=dict.fromkeys(range(1, count), (0.001, 0.0005)),
        seen={rank: frozenset({rank}) for rank in nodes},
        collectives={rank: (green("speed", "fast"), green("all-reduce", "right")) for rank in nodes},
    )


def bad(rows: tuple[Row, ...]) -> dict[tuple[int, str], Finding]:
    return {(row.rank, each.check): each for row in rows for each in row.findings if each.bad}


@pytest.mark.parametrize("count", [2, 3, 8, 40])
def test_a_sound_cluster_is_green_in_every_cell(count: int) -> None:
    rows = judge(cluster(count))
    assert not bad(rows)
    assert len(rows) == count
    for row in rows:
        checks = {each.check for each in row.findings if each.severity == Severity.GREEN}
        assert checks == {"rank", "present", "agree", "reach", "mtu", "speed", "shared", "all-reduce"}


def test_a_cluster_of_one_node_is_judged_by_its_collective_alone() -> None:
    (row,) = judge(cluster(1))
    assert [each.check for each in row.findings] == ["rank", "speed", "all-reduce"]


def test_a_node_that_did_not_come_is_a_red_row_with_its_address() -> None:
    measured = cluster(2)
    measured.nodes.pop(1)
    measured.missing = {1: "connection refused"}
    measured.packets, measured.collectives, measured.seen = {}, {}, {}
    measured.tried, measured.offsets, measured.no_collective = set(), {}, "not tried"
    rows = judge(measured)
    assert rows[1].name == "node 1 (10.0.0.2)"
    assert bad(rows).keys() == {(1, "present")}
    skipped = {each.check for each in rows[0].findings if each.severity == Severity.SKIPPED}
    assert {"reach", "mtu", "speed", "all-reduce"} <= skipped


def test_one_node_and_several_are_told_in_singular_and_plural() -> None:
    for count, words in {2: "node 1 connects to it", 3: "nodes 1, 2 connect to it"}.items():
        told = [each.sentence for each in judge(cluster(count))[0].findings if each.check == "reach"]
        assert told == [f"{words} on random ports"]


def test_no_collective_is_tried_where_a_port_is_known_to_be_taken() -> None:
    measured = cluster(2)
    assert not measured.collective_would_hang
    measured.nodes[0] = node(0, findings=(wrong("port-taken", name="MASTER_PORT", port=29400, addresses="::"),))
    assert measured.collective_would_hang


def test_a_node_that_went_away_is_red() -> None:
    measured = cluster(3)
    measured.lost = {2: "its connection closed"}
    lost = bad(judge(measured))[2, "present"]
    assert (lost.id, lost.values["reason"]) == ("node-lost", "its connection closed")


def test_a_setting_that_differs_is_red_at_the_node_that_differs_and_names_both_values() -> None:
    measured = cluster(3)
    measured.nodes[1] = node(1, facts={"torch": "2.12.0", "RUN_NAME": "default"})
    found = bad(judge(measured))
    assert found.keys() == {(1, "agree")}
    assert found[1, "agree"].severity == Severity.RED
    assert "torch 2.13.0 (nodes 0, 2) 2.12.0 (node 1)" in found[1, "agree"].sentence
    assert found[1, "agree"].fix == "Use the same image on all nodes."


def test_a_difference_that_may_be_meant_is_yellow() -> None:
    measured = cluster(2)
    measured.nodes[1] = node(1, facts={**measured.nodes[0].facts, "cuda driver": "580.82"})
    assert bad(judge(measured))[1, "agree"].severity == Severity.YELLOW


def test_of_two_hundred_packages_the_one_that_differs_is_named_and_no_other() -> None:
    measured = cluster(2)
    names = [f"some_package_{number:03}-1.{number}" for number in range(200)]
    # One more near the beginning shifts all that follow.
    for rank, installed in enumerate((names, [names[0], "some_package_000a-3.0", *names[1:]])):
        heard = json.loads(json.dumps({"kind": "hello", "facts": {"packages": " ".join(installed)}}))
        measured.nodes[rank] = node(rank, facts=read_facts(heard))
    assert bad(judge(measured))[1, "agree"].sentence == (
        "Nodes differ: package some_package_000a - (node 0) 3.0 (node 1)"
    )


def test_packages_that_are_too_many_to_name_are_counted_beside_them_and_not_in_the_cure() -> None:
    measured = cluster(2)
    for rank in (0, 1):
        packages = " ".join(f"p{number}-{rank}" for number in range(20))
        measured.nodes[rank] = node(rank, facts={"packages": packages})
    finding = bad(judge(measured))[1, "agree"]
    assert finding.sentence.endswith("; and 8 more")
    assert finding.fix.startswith("Use the same image on all nodes")


def test_a_blocked_port_stands_at_the_node_that_lets_nobody_in() -> None:
    measured = cluster(2)
    measured.blocked = {(0, 1, "no answer"): [40001, 40002]}
    found = bad(judge(measured))
    assert found.keys() == {(1, "reach")}
    assert "node 0 (10.0.0.1) cannot connect to it, port 40001 and 40002" in found[1, "reach"].sentence
    assert "random ports" in found[1, "reach"].sentence
    assert "-s 10.0.0.1 -d 10.0.0.2" in found[1, "reach"].fix
    measured.nodes = {rank: node(rank, address=f"2001:db8::{rank}") for rank in measured.nodes}
    assert bad(judge(measured))[1, "reach"].fix.startswith("sudo ip6tables -I INPUT -p tcp -s 2001:db8::0")


@pytest.mark.parametrize(("transport", "severity"), [("sockets", Severity.YELLOW), ("RoCE", Severity.RED)])
def test_an_odd_mtu_is_told_and_red_where_roce_depends_on_it(transport: str, severity: Severity) -> None:
    measured = cluster(3, transport=transport)
    measured.nodes[2] = replace(measured.nodes[2], mtu=1500)
    found = bad(judge(measured))
    assert found.keys() == {(2, "mtu")}
    assert found[2, "mtu"].severity == severity
    assert "eth2 has MTU 1500, but 9000 on nodes 0, 1" in found[2, "mtu"].sentence


def test_full_size_packets_that_are_lost_on_the_way_are_red_at_the_receiver() -> None:
    measured = cluster(2)
    measured.packets[0, 1] = "lost"
    found = bad(judge(measured))
    assert found.keys() == {(1, "mtu")}
    assert "Packets of 9000 bytes from node 0 (10.0.0.1) are lost" in found[1, "mtu"].sentence
    assert "-s 8972 10.0.0.2" in found[1, "mtu"].fix
    measured.nodes[1] = replace(measured.nodes[1], address="2001:db8::2")
    assert "-s 8952 2001:db8::2" in bad(judge(measured))[1, "mtu"].fix


def test_where_udp_does_not_pass_the_size_is_not_called_green() -> None:
    measured = cluster(2)
    measured.packets = dict.fromkeys(measured.packets, "unknown")
    rows = judge(measured)
    assert not bad(rows)
    assert all(each.severity == Severity.SKIPPED for row in rows for each in row.findings if each.check == "mtu")


@pytest.mark.parametrize(
    ("offset", "doubt", "told"), [(-90.0, 0.1, True), (90.0, 0.1, True), (1.0, 0.1, False), (90.0, 89.0, False)]
)
def test_a_clock_that_is_surely_wrong_is_told(offset: float, doubt: float, told: bool) -> None:
    measured = cluster(2)
    measured.offsets[1] = (offset, doubt)
    found = bad(judge(measured))
    assert ((1, "clock") in found) == told
    assert not told or ("behind" if offset < 0 else "ahead of") in found[1, "clock"].sentence


def test_a_folder_that_only_some_nodes_share_is_red_at_those_that_do_not() -> None:
    measured = cluster(3)
    measured.seen = {0: frozenset({0, 1}), 1: frozenset({0, 1}), 2: frozenset({2})}
    found = bad(judge(measured))
    assert found[2, "shared"].sentence == "Its checkpoint folder is its own, while nodes 0, 1 share one."
    measured.seen = {rank: frozenset({0, 1, 2}) for rank in range(3)}
    assert not bad(judge(measured))


def test_two_nodes_with_one_rank_are_told_at_the_first_row() -> None:
    measured = cluster(2)
    measured.doubles = ["Two nodes say they are node 1: a and b."]
    assert bad(judge(measured))[0, "rank"].sentence.startswith("Two nodes say")
