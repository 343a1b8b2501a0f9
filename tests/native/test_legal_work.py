"""Thirty kinds of odd but legal work, each on a rank of its own beside ranks that wait: none is taken for a hang."""

import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.launchers import nodes

SCRIPT = Path(__file__).parents[1] / "scripts" / "legal_work.py"
SECONDS, PATIENCE = 9, 2

PROCESSES = ("process_pool", "process_pool_spawn", "subprocess_alone", "grandchild", "forked_child")
PROGRAMS = ("many_short_programs", "stopped_child", "starved", "compressing", "holding_the_gil")
THREADS = (
    "thread_pool",
    "sleep_in_the_main_loop",
    "lock_that_a_thread_holds",
    "queue_of_a_thread",
    "event_loop_with_a_thread",
)
BYTES = ("download", "upload", "download_by_a_program", "slow_source", "checkpoint_to_a_slow_disk")
PEOPLE = ("stopped_and_continued", "at_the_debugger")
IDLE = ("idle_sleep", "idle_with_an_idle_pool", "idle_at_a_socket", "idle_in_a_loop")
WITH_TORCH = (
    "idle_at_the_barrier",
    "evaluation_on_one_rank",
    "compilation",
    "slow_data_loader",
    "save_in_a_thread",
    "at_a_breakpoint",
    "group_of_some",
    "group_of_some",
    "messages_first",
    "messages_second",
)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Short: sockets are put there, too."""
    folder = Path(tempfile.mkdtemp(prefix="legal"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("kinds", [(*PROCESSES, *PROGRAMS, *IDLE), (*THREADS, *BYTES, *PEOPLE, IDLE[0]), WITH_TORCH])
def test_no_kind_of_legal_work_is_told_as_a_stall_and_every_idle_rank_is(
    tmp_path: Path, temporary: Path, kinds: tuple[str, ...]
) -> None:
    told, over = set[str](), threading.Event()

    def look() -> None:
        # Who is done waits for the others, which is no legal work but idleness.
        while not over.wait(0.05) and not re.search(r"\b(?!idle)\w+ done$", launcher.text, re.MULTILINE):
            for file in temporary.glob("torchrun-compose-*/rank*.json"):
                told.add(kinds[int(file.stem.removeprefix("rank"))])

    looking = threading.Thread(target=look)
    settings = {"NPROC_PER_NODE": str(len(kinds)), "HANG_REPORT": str(PATIENCE), "TMPDIR": str(temporary)}
    with nodes(tmp_path, 1, SCRIPT.read_text(), **settings) as made:
        launcher = made.start(0, str(SECONDS), *kinds)
        looking.start()
        try:
            assert launcher.end(120) == 0, launcher.text
        finally:
            over.set()
            looking.join()
        assert "no progress on" not in launcher.text
    assert sorted(told) == sorted({kind for kind in kinds if kind.startswith("idle")})
    assert list(temporary.glob("torchrun-compose-*")) == []


def test_a_rank_that_is_stopped_for_long_is_no_hang_while_the_others_wait(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, SCRIPT.read_text(), NPROC_PER_NODE="2", HANG_REPORT=str(PATIENCE)) as made:
        began = time.monotonic()
        launcher = made.start(0, str(SECONDS), "idle_sleep", "stopped_and_continued")
        assert launcher.end(60) == 0
        assert time.monotonic() - began > SECONDS
        assert "no progress on" not in launcher.text
