"""Links between the pages of this project lead somewhere, and the variables that they name are known."""

import re
from pathlib import Path

import pytest

from app.config.settings import BY_NAME
from app.plan.typos import known_variables

PROJECT = Path(__file__).resolve().parents[2]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").rglob("*.md"))]


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings, and those written as HTML."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_link_of_a_page_leads_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


TASKS = set(re.findall(r"^([a-z][a-z-]*)(?: [a-z -]+)?:", (PROJECT / "Makefile").read_text(), re.MULTILINE))
TASKS |= {"unit", "native", "cluster"}
WORKFLOWS = [*(PROJECT / ".github/workflows").glob("*.yml")]


@pytest.mark.parametrize("page", [*PAGES, *WORKFLOWS], ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_make_command_that_a_page_or_workflow_names_is_one(page: Path) -> None:
    lines = re.findall(r"(?:^|`|run: )make ((?:[a-z][a-z-]*(?: |`|$))+)", page.read_text(), re.MULTILINE)
    assert not {word for line in lines for word in line.replace("`", " ").split()} - TASKS


GENERATED = {"faults.md", "grafana.json"}
HAND_WRITTEN = [page for page in PAGES if page.parent.name != "errors" and page.name not in GENERATED]


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_no_page_is_longer_than_200_lines(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= 200


FOREIGN = {"LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "NET_RAW", "AF_INET6", "OMPI_COMM_WORLD_RANK"}
FOREIGN |= {"GPU_REHEARSAL", "NCCL_HOSTID", "TESTBED_SUITE", "TEST_PYTHON", "CUDA_VISIBLE_DEVICES"}
FOREIGN |= {"ROCM_TORCH", "ROCM_INDEX", "CLUSTER_TESTS", "HEALTHY_RUNS", "TORCHRUN_COMPOSE_UPDATE", "NCLL_DEBUG"}
"""Names of the build, of torchrun, of the kernel and of the tests, and a misspelt one as an example."""
SCRIPTS = ("TRAIN_", "HF_", "WANDB_", "ACCELERATE_")
"""How the variables of training scripts and of what they use begin."""
CODE = "".join(file.read_text() for file in (PROJECT / "app/plan").glob("*.py"))
"""Has the variables of schedulers and of other launchers."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_variable_that_a_page_names_is_a_setting_or_a_librarys(page: Path) -> None:
    named = set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)(?:=[^`]*)?`", page.read_text()))
    ours = {name for name in named if not name.startswith(SCRIPTS) and name not in CODE}
    assert not ours - BY_NAME.keys() - known_variables() - FOREIGN
