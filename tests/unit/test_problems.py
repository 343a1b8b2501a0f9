"""Problems: one renderer, one catalogue of sentences, and no sentence that lacks one of its values."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest

from app.config import problems
from app.config.problems import CHECKS, TEXTS, filled, problem, refusal, text_of
from app.config.values import plain

PROJECT = Path(__file__).parents[2]
FILES = sorted([*(PROJECT / "app/plan").glob("*.py"), *(PROJECT / "app/config").glob("*.py")])
IDS = {f"{check}.{name}" for check, entries in tomllib.loads(TEXTS.read_text()).items() for name in entries}
AN_ID = re.compile(rf"({'|'.join(CHECKS)})\.[a-z0-9-]+")
OTHERS = {"setting", "details", "severity"}
OF_EVERY_VALUE = {"given"}
OF_COSTS = {"given"}
OF_CONCERNS = {"file", "line", "given"}
"""What app/plan/env_warnings.py and script_text.py hand over for all of theirs."""


def test_the_sentence_is_made_of_cause_fix_and_details(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"rank": {"x": {"what": "{given}: {n:process|processes} of {names}", "fix": "Write {n:node}"}}}
    monkeypatch.setattr(problems, "texts", lambda _file: texts)
    given = plain("NODES", "a\n\033[2J", ".env:3")
    found = problem("rank.x", details=("  table",), given=given, n=2, names=["a", "b"])
    assert found.message == "NODES=a\\n\\x1b[2J (.env:3): 2 processes of a, b. Write 2 nodes.\n  table"
    assert (found.check, found.setting, found.remedy) == ("rank", "NODES", "Write 2 nodes")
    assert found.to_dict()["values"] == {"given": "NODES=a\\n\\x1b[2J (.env:3)", "n": "2", "names": "a, b"}


def test_a_sentence_ends_once_and_a_value_is_never_read_as_a_part_of_it() -> None:
    assert filled("{one:is|are} {a}", {"one": True, "a": "{b}|c"}) == "is {b}|c"
    assert filled("{one:is|are}", {"one": False}) == "are"
    unknown = problem("settings.unknown-variable", name="{b}", source=".env:1", meant="NODES")
    assert unknown.message.endswith("torchrun-compose. Did you mean NODES?")


def test_several_problems_are_one_error_and_each_is_told_once() -> None:
    one, two = problem("ports.clash", given="A"), problem("rank.no-nodes", given="B")
    assert refusal([one]).message == one.message
    assert refusal([one, two, one]).message == f"2 settings are wrong:\n  - {one.message}\n  - {two.message}"


def constants(node: ast.expr) -> Iterator[str]:
    return (each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str))


def made(file: Path) -> Iterator[tuple[str, set[str] | None]]:
    """Every id that a file names, with the values that are given where the problem is made, if it is made there."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and all(each.arg for each in node.keywords):
            values = {each.arg for each in node.keywords if each.arg}
            if isinstance(node.func, ast.Name) and node.func.id == "Malformed":
                (name,) = constants(node.args[0])
                yield next(id for id in (f"value.{name}", f"script.{name}") if id in IDS), values | OF_EVERY_VALUE
            elif isinstance(node.args[0], ast.Constant | ast.IfExp):
                yield from ((id, values - OTHERS) for id in constants(node.args[0]) if AN_ID.fullmatch(id))
    yield from ((id, None) for each in tree.body for id in constants(each) if AN_ID.fullmatch(id))  # type: ignore[arg-type]


MADE = [(file.name, id, values) for file in FILES for id, values in made(file)]


def test_every_problem_that_is_made_is_in_the_catalogue_and_the_other_way_round() -> None:
    assert {id for _, id, _ in MADE} == IDS
    assert {id.partition(".")[0] for id in IDS} <= {*CHECKS, "value"}


def fields(text: str) -> set[str]:
    """Names in a sentence, those within the wording of another included."""
    parts = [(name, spec or "") for _, name, spec, _ in Formatter().parse(text) if name]
    return {name for name, _ in parts} | {inner for _, spec in parts for inner in fields(spec)}


@pytest.mark.parametrize("id", sorted(IDS))
def test_every_value_of_a_sentence_is_given_wherever_its_problem_is_made(id: str) -> None:
    text = text_of(id)
    named = fields(text["what"]) | fields(text.get("fix", ""))
    assert not text["what"].endswith((".", " ")), "the full stop is added"
    given = [values for _, each, values in MADE if each == id and values is not None]
    for values in given or [OF_CONCERNS if id.startswith("script.") else OF_COSTS]:
        assert named <= values, (id, named - values)
