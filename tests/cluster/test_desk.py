"""The desk on real engines, over OpenSSH's own server in each node's network: what it does when all is well."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.testbed import Cluster
from tests.testbed.desk import DeskBed, desk_beside


@pytest.fixture
def desk(cluster2: Cluster) -> Iterator[DeskBed]:
    with desk_beside(cluster2) as made:
        yield made


def test_check_shows_every_host_in_a_row(desk: DeskBed) -> None:
    done = desk.run("check")
    print(done.output)
    assert done.code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.startswith("gpu-")]
    assert [row[0] for row in rows] == ["gpu-a", "gpu-b"]
