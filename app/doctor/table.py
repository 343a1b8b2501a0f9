"""Findings for people and for programs: a table with colour, lines for grep, JSON."""

import json
from collections.abc import Sequence

from app.config.table import PLAIN, columns, wrapped
from app.doctor.findings import CHECKS, Finding, Row, Severity, by_check, to_dict, worst

WORDS = {Severity.SKIPPED: "-", Severity.GREEN: "ok", Severity.YELLOW: "warn", Severity.RED: "FAIL"}
COLOURS = {
    Severity.SKIPPED: "\033[2m",
    Severity.GREEN: "\033[32m",
    Severity.YELLOW: "\033[33m",
    Severity.RED: "\033[1;31m",
}
CELL_COLOURS = {word: COLOURS[severity] for severity, word in WORDS.items()}
INDENT = 20
"""Columns before a sentence, below check and word."""


def verdict(rows: Sequence[Row]) -> str:
    """The last line: how many nodes, and how they are."""
    found = [finding.severity for row in rows for finding in row.findings]
    red, yellow = found.count(Severity.RED), found.count(Severity.YELLOW)
    nodes = "1 node" if len(rows) == 1 else f"{len(rows)} nodes"
    if red:
        return f"doctor: {nodes}, NOT fit to train: {red} red, {yellow} yellow"
    return f"doctor: {nodes}, fit to train" + (f", {yellow} yellow" if yellow else "")


def exit_code(rows: Sequence[Row]) -> int:
    """0 when the worst is green or yellow, 1 when anything is red."""
    return 1 if _worst(rows) == Severity.RED else 0


def _worst(rows: Sequence[Row]) -> Severity:
    return worst(finding for row in rows for finding in row.findings)


def to_json(rows: Sequence[Row]) -> str:
    """`verdict` (green, yellow or red), `fit`, and for each node its findings."""
    nodes = [
        {"rank": row.rank, "address": row.address, "findings": [to_dict(each) for each in row.findings]} for row in rows
    ]
    return json.dumps({"verdict": _worst(rows), "fit": exit_code(rows) == 0, "nodes": nodes}, indent=2)


def to_lines(rows: Sequence[Row]) -> str:
    """One line a finding: `node 1 (10.0.0.2): reach FAIL: sentence Fix: command`."""
    lines = []
    for row in rows:
        for check, findings in by_check(row.findings).items():
            lines += [f"{row.name}: {check} {WORDS[each.severity]}: {_one_line(each)}" for each in findings]
    return "\n".join([*lines, verdict(rows)])


def _one_line(finding: Finding) -> str:
    sentence = " ".join(finding.sentence.split())
    return f"{sentence} Fix: {finding.fix}" if finding.fix else sentence


def to_table(rows: Sequence[Row], width: int, *, colour: bool) -> str:
    """Nodes by checks, whichever way fits `width`; below it what is not green. One node alone tells every check."""
    if len(rows) == 1:
        return "\n".join([rows[0].name, *_details(rows[0].findings, width, colour=colour), "", _ending(rows, colour)])
    lines = _grid(rows, width, colour=colour)
    for row in rows:
        wrong = [each for each in row.findings if each.bad]
        if wrong:
            lines += ["", row.name, *_details(wrong, width, colour=colour)]
    return "\n".join([*lines, "", _ending(rows, colour)])


def _grid(rows: Sequence[Row], width: int, *, colour: bool) -> list[str]:
    checks = [check for check in CHECKS if any(each.check == check for row in rows for each in row.findings)]
    cells = [{check: WORDS[worst(found)] for check, found in by_check(row.findings).items()} for row in rows]
    blank = WORDS[Severity.SKIPPED]
    by_node = [
        ["", *checks],
        *([row.name, *(own.get(check, blank) for check in checks)] for row, own in zip(rows, cells, strict=True)),
    ]
    turned = [
        ["", *(f"node {row.rank}" for row in rows)],
        *([check, *(own.get(check, blank) for own in cells)] for check in checks),
    ]
    needed, needed_turned = (max(map(len, columns(grid))) for grid in (by_node, turned))
    chosen = by_node if needed <= width or needed <= needed_turned else turned
    return columns(chosen, paint=(lambda _, cell: CELL_COLOURS.get(cell, "")) if colour else None)


def _details(findings: Sequence[Finding], width: int, *, colour: bool) -> list[str]:
    lines = []
    for check, found in by_check(findings).items():
        for each in found:
            word = f"{WORDS[each.severity]:<4}"
            head = f"  {check:<10}  {_painted(word, each.severity) if colour else word}  "
            first, *more = each.sentence.split("\n")
            body = [*wrapped(first, width, INDENT), *(f"{'':{INDENT}}{line}" for line in more)]
            body += [f"{'':{INDENT}}Fix: {each.fix}"] if each.fix else []
            lines += [head + body[0].strip(), *body[1:]]
    return lines


def _painted(text: str, severity: Severity) -> str:
    return f"{COLOURS[severity]}{text}{PLAIN}"


def _ending(rows: Sequence[Row], colour: bool) -> str:
    return _painted(verdict(rows), _worst(rows)) if colour else verdict(rows)
