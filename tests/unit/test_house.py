"""Rules of the house that no linter knows."""

import ast
from collections import defaultdict
from pathlib import Path

PROJECT = Path(__file__).parents[2]
TREES = {file.relative_to(PROJECT): ast.parse(file.read_text(encoding="utf-8")) for file in PROJECT.glob("app/**/*.py")}
MEANT = {"Host"}
"""The desk's hosts are machines behind ssh; it knows nothing of `app.host`."""


def test_no_class_name_is_used_twice() -> None:
    found = defaultdict[str, list[Path]](list)
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(file)
    assert {name: files for name, files in found.items() if len(files) > 1 and name not in MEANT} == {}


def test_no_number_is_made_of_a_condition() -> None:
    found = [
        f"{file}:{node.lineno}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and any(isinstance(side, ast.Compare) for side in (node.left, node.right))
        if isinstance(node.op, ast.Mult | ast.Add | ast.Sub)
    ]
    assert found == [], "write it as if and else"
