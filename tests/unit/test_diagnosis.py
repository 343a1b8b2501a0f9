"""Which known error a report names: the node's own first error, never what healthy ranks print beside it."""

import pytest

from app.engine.outcome import Failure
from app.engine.torchrun import first_cause_first
from app.report.diagnosis import diagnosis
from app.report.history import RoundRecord

PEER = "RuntimeError: [/gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:39558. This is typically caused by ..."
NO_MODULE = "ModuleNotFoundError: No module named 'flash_attn'"
OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB."
ELSEWHERE = "node 1 (10.0.0.2) - rank 3 failed with {} (exit code 1), at 06:29:22 UTC (node 0 stopped as a result)"
REMARKS = (
    PEER,
    f"{NO_MODULE}, falling back to plain attention",
    "OSError: [Errno 30] Read-only file system: '/home/me/.cache', caching is off",
    "node1:101:101 [0] NCCL INFO NET/IB : No device found.",
)


def failed(text: str = "", exitcode: int = 1, *, halted: bool = False) -> RoundRecord:
    """A round in which local rank 1 failed first, with the exception `text`."""
    failure = Failure(rank=3, local_rank=1, exitcode=exitcode, text=text)
    trace = f'Traceback:\n  File "my.py", line 7, in step\n{text}\n' if text else ""
    return RoundRecord(run_id="r", code=1, time=1.0, failures=(failure,), message=text, traceback=trace, halted=halted)


def named(
    last: RoundRecord | None, own: str = "", other: str = "", verdict: str = "verdict", *, memory_kills: bool = False
) -> str:
    logs = {"local rank 0 stderr": other, "local rank 1 stderr": own, "local rank 10 stderr": ""}
    found = diagnosis(last, logs, verdict, memory_kills=memory_kills)
    return found.error.id if found else ""


@pytest.mark.parametrize("remark", REMARKS)
def test_what_healthy_ranks_print_too_never_stands_beside_an_own_exception(remark: str) -> None:
    assert named(failed("ValueError: bad batch"), remark, remark) == ""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (OUT_OF_MEMORY, "gpu-memory"),
        ("OSError: [Errno 28] No space left on device", "disk-full"),
        (NO_MODULE, "package-missing"),
    ],
)
def test_an_own_exception_that_is_known_is_named_whatever_else_is_said(text: str, name: str) -> None:
    assert named(failed(text), "\n".join(REMARKS), "Driver/library version mismatch", ELSEWHERE.format(text)) == name


def test_a_broken_thing_in_the_last_words_of_the_failed_rank_explains_its_exception() -> None:
    text = "DistBackendError: NCCL error, unhandled system error (run with NCCL_DEBUG=INFO for details)"
    full = "NCCL WARN Error: failed to extend /dev/shm/nccl-03v824 to 4194660 bytes"
    assert named(failed(text), full) == "nccl-shm-full"
    assert named(failed(text), "", full) == "nccl-system-error"
    assert named(failed("RuntimeError: of no table"), full) == "nccl-shm-full"
    assert named(failed(text), full + "\nstep" * 500) == "nccl-system-error"


def test_a_complaint_about_a_peer_is_explained_by_the_verdict_and_else_named_as_the_consequence_it_is() -> None:
    assert named(failed(PEER), verdict=ELSEWHERE.format(NO_MODULE)) == "package-missing"
    assert named(failed(PEER), OUT_OF_MEMORY, verdict=ELSEWHERE.format("ValueError: bad batch")) == "gloo-peer-closed"
    assert named(failed(PEER), other=OUT_OF_MEMORY) == "gpu-memory"


def test_a_node_that_was_told_to_end_takes_the_cause_from_the_verdict_and_not_from_its_healthy_ranks() -> None:
    for last in (failed(exitcode=-15, halted=True), None):
        assert named(last, OUT_OF_MEMORY, verdict=ELSEWHERE.format("ValueError: bad batch")) == ""
        assert named(last, verdict=ELSEWHERE.format(NO_MODULE)) == "package-missing"
        assert named(last, verdict="node 1 (10.0.0.2) - rank 3 was ended by SIGKILL (out of memory...)") == "killed-9"


def test_a_killed_worker_is_explained_by_what_the_kernel_or_any_log_says_of_memory() -> None:
    last = failed(exitcode=-9)
    assert named(last, "\n".join(REMARKS), PEER) == "killed-9"
    assert named(last, NO_MODULE, memory_kills=True) == "oom-kernel"
    assert named(last, other="Memory cgroup out of memory: Killed process 6478 (python)") == "oom-kernel"


@pytest.mark.parametrize(
    ("code", "words", "name"),
    [
        (-6, "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1", "nccl-timeout"),
        (-6, PEER, "gloo-peer-closed"),
        (-6, "nothing", "aborted"),
        (-7, "", "bus-error"),
        (-11, "\n".join(REMARKS), "segfault"),
        (2, "train.py: error: unrecognized arguments: --lr0 0.1", "script-arguments"),
        (7, "nothing", ""),
    ],
)
def test_an_end_without_an_exception_is_explained_by_the_ranks_last_words_or_by_its_signal(
    code: int, words: str, name: str
) -> None:
    assert named(failed(exitcode=code), words) == name


def test_a_complaint_about_a_peer_does_not_come_before_that_peers_own_exception() -> None:
    peer, own = Failure(rank=2, exitcode=1, text=PEER), Failure(rank=3, exitcode=1, text="ValueError: bad batch")
    ended, killed = Failure(rank=1, exitcode=-15), Failure(rank=0, exitcode=-9)
    assert first_cause_first([peer, own, ended]) == (own, peer, ended)
    assert first_cause_first([own, peer]) == (own, peer)
    assert first_cause_first([peer, ended]) == (peer, ended)
    assert first_cause_first([killed, peer, own]) == (killed, peer, own)
    assert first_cause_first([]) == ()
