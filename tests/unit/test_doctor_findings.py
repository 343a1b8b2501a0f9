"""The catalogue of what doctor may find: all of it is found somewhere, with every value that its sentence tells."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.doctor.findings import CHECKS, TEXTS, Severity
from tests.unit.test_problems import constants, fields

DOCTOR = Path(__file__).parents[2] / "app/doctor"
BOOK = tomllib.loads(TEXTS.read_text())
ENTRIES = {id: entry for entries in BOOK.values() for id, entry in entries.items()}
OF_BENCH = {"slow-node", "slow-path", "below-link", "all-below-link"}
"""Ids of `app.bench.verdict`."""


def made() -> Iterator[tuple[str, set[str] | None]]:
    """Every id that doctor names, with the values that are given there; None where they are not all written out."""
    for file in DOCTOR.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "wrong"]
        for call in calls:
            values = {each.arg for each in call.keywords if each.arg}
            written_out = all(each.arg for each in call.keywords)
            yield from ((id, values if written_out else None) for id in constants(call.args[0]))
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in ENTRIES]
        yield from ((str(node.value), None) for node in names)


MADE = list(made())


def test_every_finding_that_is_made_is_in_the_catalogue_and_the_other_way_round() -> None:
    assert {id for id, _ in MADE} | OF_BENCH == ENTRIES.keys()
    assert len(ENTRIES) == sum(map(len, BOOK.values())), "one id at two checks"
    assert BOOK.keys() <= set(CHECKS)


@pytest.mark.parametrize("id", sorted(ENTRIES))
def test_every_value_of_a_finding_is_given_wherever_it_is_made(id: str) -> None:
    entry = ENTRIES[id]
    assert entry.get("severity", Severity.RED) in (Severity.RED, Severity.YELLOW)
    for given in (values for each, values in MADE if each == id and values is not None):
        assert fields(entry["text"]) | fields(entry.get("fix", "")) <= given
