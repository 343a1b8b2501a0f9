"""Each recipe is complete: settings that are valid, packages with their versions, and what it prints."""

import re
from pathlib import Path

import pytest

from app.config.settings import read_settings

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/train.py"))


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_of_a_recipe_are_valid_and_lead_to_its_script(name: str) -> None:
    settings = read_settings({}, EXAMPLES / name / ".env")
    assert settings.problems == ()
    assert settings.text("WORKSPACE") == f"./examples/{name}"
    assert settings.text("TRAIN_SCRIPT") == "train.py"
    needs_more = (EXAMPLES / name / "Dockerfile").exists()
    assert settings.text("IMAGE") == (f"torchrun-compose:{name}" if needs_more else "")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_pins_what_it_installs_and_shows_what_it_prints(name: str) -> None:
    dockerfile = EXAMPLES / name / "Dockerfile"
    text = dockerfile.read_text() if dockerfile.exists() else ""
    for line in re.findall(r"pip install (.*)", text):
        assert all("==" in word for word in line.split() if not word.startswith("-"))
    expected = (EXAMPLES / name / "expected.txt").read_text()
    assert "rank 0 begins at" in expected


def test_the_page_lists_every_recipe() -> None:
    page = (EXAMPLES.parent / "docs/own-script.md").read_text()
    assert {name for name in NAMES if f"../examples/{name}/train.py" in page} == set(NAMES)
