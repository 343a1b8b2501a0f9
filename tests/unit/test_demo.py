"""What `make demo` gives its two nodes."""

import os

import pytest

from demo.__main__ import job


def test_two_nodes_on_one_machine_share_its_processors_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert int(job(0, "demo")["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert job(1, "demo")["OMP_NUM_THREADS"] == "7"
