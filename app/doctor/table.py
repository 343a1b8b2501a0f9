"""Findings for people and for programs: a table with colour, lines for grep, JSON."""

import json
import textwrap
from collections.abc import Sequence

from app.doctor.findings import CHECKS, Finding, Level, Row, by_check, to_dict, worst

WORDS = {Level.SKIPPED: "-", Level.GREEN: "ok", Level.YELLOW: "warn", Level.RED: "FAIL"}
COLOURS = {Level.SKIPPED: "\033[2m", Level.GREEN: "\033[32m", Level.YELLOW: "\033[33m", Level.RED: "\033[1;31m"}
PLAIN = "\033[0m"


def verdict(rows: Sequence[Row]) -> str:
    """The last line: how many nodes, and how they are."""
    levels = [finding.level for row in rows for finding in row.findings]
    red, yellow = levels.count(Level.RED), levels.count(Level.YELLOW)
    nodes = "1 node" if len(rows) == 1 else f"{len(rows)} nodes"
    if red:
        return f"doctor: {nodes}, NOT fit to train: {red} red, {yellow} yellow"
    return f"doctor: {nodes}, fit to train" + (f", {yellow} yellow" if yellow else "")


def exit_code(rows: Sequence[Row]) -> int:
    """0 when the worst is green or yellow, 1 when anything is red."""
    return int(worst(finding for row in rows for finding in row.findings) == Level.RED)


def to_json(rows: Sequence[Row]) -> str:
    """`verdict` (green, yellow or red), `fit`, and for each node its findings."""
    level = worst(finding for row in rows for finding in row.findings)
    content = {"verdict": level, "fit": not exit_code(rows), "nodes": [to_dict(row) for row in rows]}
    return json.dumps(content, indent=2)


def to_lines(rows: Sequence[Row]) -> str:
    """One line a finding: `node 1 (10.0.0.2): reach FAIL: sentence Cure: command`."""
    lines = []
    for row in rows:
        for check, findings in by_check(row.findings).items():
            lines += [f"{row.name}: {check} {WORDS[each.level]}: {_one_line(each)}" for each in findings]
    return "\n".join([*lines, verdict(rows)])


def _one_line(finding: Finding) -> str:
    sentence = " ".join(finding.sentence.split())
    return f"{sentence} Cure: {finding.cure}" if finding.cure else sentence


def to_table(rows: Sequence[Row], width: int, *, colour: bool) -> str:
    """Nodes by checks, whichever way fits `width`; below it what is not green. One node alone tells every check."""
    if len(rows) == 1:
        return "\n".join([rows[0].name, *_told(rows[0], width, colour=colour), "", _ending(rows, colour=colour)])
    checks = [check for check in CHECKS if any(each.check == check for row in rows for each in row.findings)]
    cells = {row.rank: {check: worst(found) for check, found in by_check(row.findings).items()} for row in rows}
    grid = [["", *checks], *([row.name, *(_cell(cells[row.rank].get(check)) for check in checks)] for row in rows)]
    if _breadth(grid) > width:
        short = [[check, *(_cell(cells[row.rank].get(check)) for row in rows)] for check in checks]
        turned = [["", *(f"node {row.rank}" for row in rows)], *short]
        grid = turned if _breadth(turned) < _breadth(grid) else grid
    lines = _aligned(grid, colour=colour)
    for row in rows:
        wrong = Row(rank=row.rank, address=row.address, findings=tuple(each for each in row.findings if _bad(each)))
        if wrong.findings:
            lines += ["", row.name, *_told(wrong, width, colour=colour)]
    return "\n".join([*lines, "", _ending(rows, colour=colour)])


def _bad(finding: Finding) -> bool:
    return finding.level in (Level.YELLOW, Level.RED)


def _cell(level: Level | None) -> str:
    return WORDS[Level.SKIPPED if level is None else level]


def _breadth(grid: Sequence[Sequence[str]]) -> int:
    return sum(max(len(row[column]) for row in grid) + 2 for column in range(len(grid[0])))


def _aligned(grid: Sequence[Sequence[str]], *, colour: bool) -> list[str]:
    widths = [max(len(row[column]) for row in grid) for column in range(len(grid[0]))]
    return [
        "  ".join(
            _painted(cell, cell.ljust(size), colour=colour) for cell, size in zip(row, widths, strict=True)
        ).rstrip()
        for row in grid
    ]


def _painted(cell: str, text: str, *, colour: bool) -> str:
    level = next((level for level, word in WORDS.items() if word == cell), None)
    return f"{COLOURS[level]}{text}{PLAIN}" if colour and level else text


def _told(row: Row, width: int, *, colour: bool) -> list[str]:
    lines = []
    for check, findings in by_check(row.findings).items():
        for each in findings:
            head = f"  {check:<10}  {_painted(WORDS[each.level], f'{WORDS[each.level]:<4}', colour=colour)}  "
            first, *more = each.sentence.split("\n")
            body = [*_wrapped(first, width), *(f"{'':20}{line}" for line in more)]
            body += [f"{'':20}Cure: {each.cure}"] if each.cure else []
            lines += [head + body[0].strip(), *body[1:]]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    indent = " " * 20
    return textwrap.wrap(text, max(width, 50), initial_indent=indent, subsequent_indent=indent) or [""]


def _ending(rows: Sequence[Row], *, colour: bool) -> str:
    level = worst(finding for row in rows for finding in row.findings)
    text = verdict(rows)
    return f"{COLOURS[level]}{text}{PLAIN}" if colour else text
