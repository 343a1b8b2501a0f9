"""Real nodes for the tests of this folder: made once a session, cleared before every test."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.testbed import BedError, Cluster, cluster
from tests.testbed.desk import DeskBed, desk_beside

BED = pytest.StashKey[Cluster]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without an engine these tests fail; leaving them out is the user's decision."""
    if os.environ.get("CLUSTER_TESTS") == "skip":
        here = Path(__file__).parent
        for item in items:
            if item.path.is_relative_to(here):
                item.add_marker(pytest.mark.skip(reason="CLUSTER_TESTS=skip"))


@pytest.fixture(scope="session")
def bed(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster of this session; tests ask for cluster2 or cluster4."""
    try:
        context = cluster(nodes=2)
        made = context.__enter__()
    except BedError as error:
        pytest.fail(f"no cluster: {error} (or leave these tests out: CLUSTER_TESTS=skip)", pytrace=False)
    request.config.stash[BED] = made
    try:
        yield made
    finally:
        context.__exit__(None, None, None)


@pytest.fixture
def cluster2(bed: Cluster) -> Cluster:
    """Two nodes as new."""
    bed.clear()
    return replace(bed, nodes=bed.nodes[:2])


@pytest.fixture
def cluster4(bed: Cluster) -> Cluster:
    """Four nodes as new; the second pair is made when a test first asks."""
    bed.grow(4)
    bed.clear()
    return bed


@pytest.fixture
def desk2(cluster2: Cluster) -> Iterator[DeskBed]:
    """Two nodes as new with ssh servers, and a desk beside them."""
    with desk_beside(cluster2) as desk:
        yield desk


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what every node said."""
    report = yield
    made = item.config.stash.get(BED, None)
    if report.when == "call" and report.failed and made is not None:
        for node in made.nodes:
            for stack in node.stacks:
                report.sections.append((f"{node.name} {stack.project}", last_words(stack.tail)))
    return report


def last_words(tail: object) -> str:
    try:
        return str(tail(100)) if callable(tail) else ""
    except Exception as error:  # The container may be gone, and the test's own failure is what counts.
        return f"no log: {error}"
