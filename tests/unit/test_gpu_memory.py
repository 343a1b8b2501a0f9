"""GPU memory before a restart. FAKE: a list of answers stands for the driver; no GPU is at hand."""

import asyncio
import threading
from collections.abc import Mapping

import pytest

from app.supervise import gpu_memory
from app.supervise.gpu_memory import until_free


def wait(before: Mapping[int, int], *answers: Mapping[int, int], limit: float = 5) -> tuple[list[str], int]:
    """What was said, and how often the driver was asked; its last answer stays."""
    said, asked = list[str](), list[Mapping[int, int]]()

    def measure() -> Mapping[int, int]:
        asked.append(answers[min(len(asked), len(answers) - 1)])
        return asked[-1]

    asyncio.run(until_free(before, measure, said.append, limit))
    return said, len(asked)


def test_a_round_waits_until_every_gpu_uses_no_more_than_before_the_job() -> None:
    assert wait({0: 10, 1: 3000}, {0: 70_000, 1: 3000}, {0: 900, 1: 3000}, {0: 10, 1: 3010}) == ([], 3)


def test_free_memory_is_asked_for_once_and_without_gpus_nobody_is_asked() -> None:
    assert wait({0: 10}, {0: 200}) == ([], 1)
    assert wait({}, {0: 70_000}) == ([], 0)


def test_memory_that_stays_in_use_is_told_with_its_gpu_and_holds_the_next_round_for_a_bounded_time() -> None:
    [said], asked = wait({0: 10, 1: 0}, {0: 40_010, 1: 0}, limit=0.3)
    assert asked > 1
    assert "GPU 0 40,000 MiB" in said
    assert "GPU 1" not in said


def test_a_driver_that_does_not_answer_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "ANSWER", 0.05)
    said, never = list[str](), threading.Event()
    asyncio.run(until_free({0: 1}, lambda: {0: int(never.wait(30))}, said.append))
    never.set()
    assert len(said) == 1
