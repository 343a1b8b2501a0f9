"""Problems: one renderer, and no sentence that lacks one of its values."""

import ast
from pathlib import Path
from string import Formatter

import pytest

from app.config.problems import CHECKS, problem, refusal
from app.config.values import plain

PROJECT = Path(__file__).parents[2]
FILES = sorted([*(PROJECT / "app/plan").glob("*.py"), *(PROJECT / "app/config").glob("*.py")])
FIELDS = {"what", "fix", "setting", "details", "severity"}


def test_the_sentence_is_made_of_cause_fix_and_details() -> None:
    given = plain("NODES", "a\n\033[2J", ".env:3")
    found = problem(
        "rank.x", "error", what="{given}: {n:process|processes} of {names}", fix="Write {n:node}", details=("  table",),
        given=given, n=2, names=["a", "b"],
    )  # fmt: skip
    assert found.message == "NODES=a\\n\\x1b[2J (.env:3): 2 processes of a, b. Write 2 nodes.\n  table"
    assert (found.check, found.setting, found.remedy) == ("rank", "NODES", "Write 2 nodes")
    assert found.to_dict()["values"] == {"given": "NODES=a\\n\\x1b[2J (.env:3)", "n": "2", "names": "a, b"}
    assert problem("rank.y", "warning", what="x", fix="Did you mean {a}?", a="{b}").message == "x. Did you mean {b}?"


def test_several_problems_are_one_error_and_each_is_told_once() -> None:
    one, two = problem("rank.x", "error", what="x"), problem("rank.y", "error", what="y")
    assert refusal([one]).message == "x."
    assert refusal([one, two, one]).message == "2 settings are wrong:\n  - x.\n  - y."


def placeholders(node: ast.expr, strings: dict[str, list[ast.expr]]) -> set[str]:
    """The names in a sentence, or in all sentences that a variable may hold."""
    if isinstance(node, ast.Name):
        return {name for each in strings.get(node.id, []) for name in placeholders(each, {})}
    if isinstance(node, ast.IfExp):
        return placeholders(node.body, strings) | placeholders(node.orelse, strings)
    text = ""
    if isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
    elif isinstance(node, ast.Constant):
        text = str(node.value)
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def calls(file: Path) -> list[tuple[ast.Call, dict[str, list[ast.expr]]]]:
    """Each place that makes a problem, with the strings that its function's variables may hold."""
    found = []
    for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            strings: dict[str, list[ast.expr]] = {}
            for node in ast.walk(function):
                if isinstance(node, ast.Assign):
                    target, value = node.targets[0], node.value
                    pairs = (
                        zip(target.elts, value.elts, strict=True)
                        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                        else [(target, value)]
                    )
                    for name, each in pairs:
                        if isinstance(name, ast.Name):
                            strings.setdefault(name.id, []).append(each)
            found += [
                (node, strings)
                for node in ast.walk(function)
                if isinstance(node, ast.Call) and {each.arg for each in node.keywords} >= {"what"}
            ]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_value_of_a_sentence_is_given_and_its_id_begins_with_a_check(file: Path) -> None:
    for call, strings in calls(file):
        keywords = {each.arg: each.value for each in call.keywords if each.arg}
        if not call.args or any(each.arg is None for each in call.keywords):
            continue
        named = placeholders(keywords["what"], strings) | placeholders(keywords.get("fix", ast.Constant("")), strings)
        assert named <= keywords.keys() - FIELDS, (file.name, call.lineno, named)
        if isinstance(call.args[0], ast.Constant):
            assert str(call.args[0].value).partition(".")[0] in CHECKS, (file.name, call.lineno)
