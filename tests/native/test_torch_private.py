"""The names of torch that it does not document are where app/engine/torch_private.py says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from app.engine import torch_private
from app.engine.torch_private import ENGINE, WATCHDOG, Name

ROOM = Path(torch_private.__file__).parent


def test_this_torch_has_every_private_name_that_is_used() -> None:
    assert torch_private.missing(ENGINE + WATCHDOG) == ()


@pytest.mark.parametrize("path", ["SubprocessContext._gone", "Gone"])
def test_a_name_that_is_gone_is_found_missing(path: str) -> None:
    gone = Name(module=ENGINE[0].module, path=path, used_for="nothing")
    assert torch_private.missing((*ENGINE, gone)) == (gone,)


def test_a_module_that_is_gone_is_found_missing() -> None:
    gone = Name(module="torch.distributed.gone", path="x", used_for="nothing")
    assert torch_private.missing((gone,)) == (gone,)


def test_no_private_method_of_torch_is_overridden_that_is_not_listed() -> None:
    listed = {name.path.rpartition(".")[2] for name in ENGINE}
    tree = ast.parse((ROOM / "elastic.py").read_text())
    classes = [each for each in ast.walk(tree) if isinstance(each, ast.ClassDef) and each.bases]
    overridden = {
        each.name
        for owner in classes
        for each in owner.body
        if isinstance(each, ast.FunctionDef)
        if each.name[1] != "_"
    }
    assert overridden
    assert overridden <= listed
