"""One version: of the project, of `--version`, of the image's label, and of what nodes compare."""

import re
import tomllib
from pathlib import Path

import pytest

import entrypoint
from app.config.project import PROJECT, VERSION
from app.gang.agreement import gather
from tests.machines.facts import drafted


def test_version_label_wire_and_project_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"] == VERSION
    assert re.findall(r'image\.version="([^"]+)"', (PROJECT / "Dockerfile").read_text()) == [VERSION]
    assert entrypoint.main(["--version"]) == 0
    assert capsys.readouterr().out == f"torchrun-compose {VERSION}\n"
    plan = drafted("laptop", tmp_path).plan
    assert plan
    assert gather(plan, tmp_path)["torchrun-compose"].startswith(f"{VERSION} (")
