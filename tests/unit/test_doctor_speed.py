"""What doctor makes of bench's figures: slow nodes and paths at the rows they concern."""

import json
from dataclasses import replace
from itertools import permutations

import pytest

from app.bench.figures import Findings, PairSpeed
from app.bench.report import as_json
from app.doctor.cluster_checks.speed import judge_speed, read_speeds
from app.doctor.findings import Finding, Severity
from app.host.links import Link

GBIT = 125e6


def found(nodes: int, *slow: tuple[int, int], gigabits: float = 1, link: float | None = 100) -> Findings:
    """A cluster whose paths reach 20 Gb/s, those of `slow` only `gigabits`."""
    return Findings(
        nodes=tuple(f"10.0.0.{node + 1}" for node in range(nodes)),
        ranks=nodes,
        backend="nccl",
        device="cpu",
        links=tuple(Link(name="eth0", rate=link * GBIT if link else None) for _ in range(nodes)),
        pairs=tuple(
            PairSpeed(source=one, target=two, bandwidth=(gigabits if (one, two) in slow else 20) * GBIT, latency=25e-6)
            for one, two in permutations(range(nodes), 2)
        ),
        measures=(),
        unsupported=(),
        cut_short=(),
    )


def rows(findings: Findings) -> dict[int, list[Finding]]:
    """Findings by node, from the very file that bench writes."""
    written = json.loads(json.dumps(as_json(findings)))
    return {rank: list(judge_speed(read_speeds(written, rank), rank, "eth0")) for rank in range(len(findings.nodes))}


@pytest.mark.parametrize("nodes", [2, 3, 8])
def test_a_sound_cluster_is_green_on_every_node(nodes: int) -> None:
    for (finding,) in rows(found(nodes)).values():
        assert (finding.id, finding.values["peers"]) == ("speed-ok", "1 node" if nodes == 2 else f"{nodes - 1} nodes")
        assert finding.sentence.startswith("at least 20.0 Gb/s with ")


def test_one_node_alone_has_no_row_for_speed() -> None:
    assert rows(found(1)) == {0: []}


def test_a_slow_path_is_told_at_both_ends_each_with_its_direction() -> None:
    told = rows(found(2, (0, 1)))
    assert [(one.id, one.severity) for one in (*told[0], *told[1])] == [("slow-path", Severity.RED)] * 2
    assert told[0][0].sentence.startswith("Sends 1.0 Gb/s to node 1, while others reach 20.0 Gb/s")
    assert told[1][0].sentence.startswith("Receives 1.0 Gb/s from node 0, ")


def test_of_four_nodes_the_slow_one_is_told_alone() -> None:
    slow = [edge for edge in permutations(range(4), 2) if 2 in edge]
    told = rows(found(4, *slow))
    assert {rank: [one.id for one in findings] for rank, findings in told.items()} == {
        0: ["speed-ok"],
        1: ["speed-ok"],
        2: ["slow-node"],
        3: ["speed-ok"],
    }
    assert told[2][0].sentence.startswith("Sends and receives slowly: 1.0 Gb/s with every other node")


@pytest.mark.parametrize(
    ("link", "gigabits", "severity"),
    [
        (1, 0.94, None),
        (1, 0.5, Severity.YELLOW),
        (1, 0.1, Severity.RED),
        (100, 4.0, None),
        (100, 2.0, Severity.YELLOW),
        (100, 1.0, Severity.RED),
    ],
)
def test_a_pair_is_judged_by_its_link_and_no_more_is_asked_than_one_stream_gives(
    link: float, gigabits: float, severity: Severity | None
) -> None:
    told = rows(found(2, (0, 1), (1, 0), gigabits=gigabits, link=link))[0]
    assert {one.severity for one in told} == {severity or Severity.GREEN}
    assert severity is None or {one.id for one in told} == {"below-link"}


def test_a_cluster_that_is_slow_as_a_whole_is_told_once_on_every_node() -> None:
    told = rows(found(4, *permutations(range(4), 2)))
    assert [[one.id for one in findings] for findings in told.values()] == [["all-below-link"]] * 4
    assert told[3][0].values["paths"] == 12


def test_a_far_node_is_told_once() -> None:
    near = found(2)
    far = replace(near, pairs=tuple(replace(pair, latency=0.015) for pair in near.pairs))
    told = rows(far)
    assert [one.id for one in told[0]] == ["speed-ok"]
    assert "pair-far" in [one.id for one in told[1]]
