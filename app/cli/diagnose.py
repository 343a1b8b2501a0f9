"""`diagnose`: what the error in a log means and what fixes it, for any log of any tool; no run is needed."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from app.config.errors import UserError
from app.config.options import Parser
from app.known_errors.diagnose import Diagnosis, diagnose

READ_BYTES = 64 << 20
"""Of the end of a file."""


def main(arguments: Sequence[str]) -> int:
    """0 when an error of the table is in the text, 1 when none is. Raises UserError."""
    wanted = options(arguments)
    found = diagnose(read(wanted.file))
    print(to_json(found) if wanted.json else to_text(found))
    return 0 if found else 1


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="diagnose",
        description="What the error in a log means, and its fix. Exit code: 0 if it is known, 1 if not.",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="any log; - is standard input")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser.read(arguments)


def read(name: str) -> str:
    """Raises UserError."""
    if name == "-":
        if sys.stdin.isatty():
            print("Paste the error, then press Ctrl-D:", file=sys.stderr, flush=True)
        return sys.stdin.buffer.read().decode("utf-8", errors="replace")
    try:
        with Path(name).open("rb") as file:
            if (size := file.seek(0, 2)) > READ_BYTES:
                skipped = size - READ_BYTES
                print(f"{name}: only the last {READ_BYTES >> 20} MiB are read", file=sys.stderr, flush=True)
            else:
                skipped = 0
            file.seek(skipped)
            return file.read().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from None


def to_text(found: Diagnosis | None) -> str:
    if found is None:
        return "no known error. If it is one, please report its text."
    error = found.error
    return (
        f"{error.id} (line {found.number}): {found.line}\ncause: {error.cause}\nfix: {error.fix}\n"
        f"more: docs/errors/{error.layer}.md#{error.id}"
    )


def to_json(found: Diagnosis | None) -> str:
    if found is None:
        return json.dumps({"id": None})
    error = found.error
    fields = {"id": error.id, "layer": error.layer, "rank": error.rank, "cause": error.cause, "fix": error.fix}
    return json.dumps({**fields, "line": found.line, "line_number": found.number}, indent=2)
