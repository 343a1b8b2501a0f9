"""Tables and wrapped text for terminals: one printer for explain, doctor and bench."""

import textwrap
from collections.abc import Callable, Collection, Sequence

PLAIN = "\033[0m"
LEAST_WIDTH = 30
"""Columns that text is given even on a narrower terminal."""

Paint = Callable[[int, str], str]
"""The colour (an escape sequence, "" for none) of a cell in a column."""


def columns(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), paint: Paint | None = None) -> list[str]:
    """One line a row, each column as wide as its widest cell; columns in `right` are flush right. A row may be short:
    its last cell then takes what room it needs."""
    count = max(map(len, rows), default=0)
    placed = [row if len(row) == count else row[:-1] for row in rows]
    widths = [max((len(row[at]) for row in placed if len(row) > at), default=0) for at in range(count)]
    lines = []
    for row in rows:
        padded = [
            _painted(cell, cell.rjust(width) if column in right else cell.ljust(width), column, paint)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _painted(cell: str, padded: str, column: int, paint: Paint | None) -> str:
    colour = paint(column, cell) if paint else ""
    return f"{colour}{padded}{PLAIN}" if colour else padded


def wrapped(text: str, width: int, indent: int) -> list[str]:
    """`text` in lines of at most `width` columns, each indented; at least one line."""
    space = " " * indent
    room = max(LEAST_WIDTH + indent, width)
    return textwrap.wrap(text, room, initial_indent=space, subsequent_indent=space) or [""]
