"""Findings as a table, as lines and as JSON; the exit code."""

import json

from app.doctor.findings import Finding, Row, Severity, green, skipped
from app.doctor.table import exit_code, to_json, to_lines, to_table

SLOW = Finding(
    id="pair-slow",
    check="speed",
    severity=Severity.YELLOW,
    text="To node {peer}: {rate}.",
    fix="ethtool eth0",
    values={"peer": 1, "rate": "0.9 Gb/s"},
)
CUT = Finding(
    id="port-blocked",
    check="reach",
    severity=Severity.RED,
    text="Cannot reach node {peer}:\n  port 29400",
    fix="open it",
    values={"peer": 1},
)


def rows(*nodes: tuple[Finding, ...]) -> list[Row]:
    return [Row(rank=rank, address=f"10.0.0.{rank + 1}", findings=found) for rank, found in enumerate(nodes)]


WELL = (green("rank", "0 of 2"), skipped("gpus", "none"))


def test_the_exit_code_is_1_for_red_and_0_for_anything_better() -> None:
    assert exit_code(rows(WELL, WELL)) == 0
    assert exit_code(rows(WELL, (*WELL, SLOW))) == 0
    assert exit_code(rows((*WELL, CUT), WELL)) == 1


def test_lines_carry_node_check_level_sentence_and_fix_on_one_line_each() -> None:
    text = to_lines(rows(WELL, (*WELL, SLOW, CUT))).splitlines()
    assert "node 0 (10.0.0.1): rank ok: 0 of 2" in text
    assert "node 0 (10.0.0.1): gpus -: none" in text
    assert "node 1 (10.0.0.2): speed warn: To node 1: 0.9 Gb/s. Fix: ethtool eth0" in text
    assert "node 1 (10.0.0.2): reach FAIL: Cannot reach node 1: port 29400 Fix: open it" in text
    assert text[-1] == "doctor: 2 nodes, NOT fit to train: 1 red, 1 yellow"


def test_json_tells_the_verdict_and_every_finding() -> None:
    content = json.loads(to_json(rows(WELL, (*WELL, SLOW))))
    assert (content["verdict"], content["fit"]) == ("yellow", True)
    assert content["nodes"][1]["findings"][-1] == {
        "id": "pair-slow",
        "check": "speed",
        "severity": "yellow",
        "sentence": "To node 1: 0.9 Gb/s.",
        "values": {"peer": 1, "rate": "0.9 Gb/s"},
        "fix": "ethtool eth0",
    }


def test_a_table_shows_the_worst_of_each_cell_and_tells_only_what_is_wrong() -> None:
    text = to_table(rows(WELL, (*WELL, SLOW, CUT)), 100, colour=False)
    head, first, second = text.splitlines()[:3]
    assert head.split() == ["rank", "gpus", "reach", "speed"]
    assert first.split() == ["node", "0", "(10.0.0.1)", "ok", "-", "-", "-"]
    assert second.split() == ["node", "1", "(10.0.0.2)", "ok", "-", "FAIL", "warn"]
    assert "0 of 2" not in text
    assert "Fix: open it" in text
    assert "\033" not in text


def test_a_table_too_wide_for_the_terminal_is_turned() -> None:
    text = to_table(rows(WELL, (*WELL, SLOW, CUT)), 30, colour=True)
    assert text.splitlines()[0].split() == ["node", "0", "node", "1"]
    assert "\033[1;31mFAIL" in text


def test_one_node_alone_is_told_everything() -> None:
    text = to_table(rows(WELL), 80, colour=False)
    assert "0 of 2" in text
    assert text.endswith("doctor: 1 node, fit to train")
