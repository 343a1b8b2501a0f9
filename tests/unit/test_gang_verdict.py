"""Who is to blame: the first cause among many failures, in one line."""

from app.config.exitcodes import ExitCode
from app.engine.outcome import Explanation
from app.gang.messages import Event, WorkerReport
from app.gang.round import RoundState
from app.gang.verdict import JobEnded, NodeFailure, Weight, first_causes, summarize, worker_failure

CLOSED = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:44775"


def report(rank: int, exitcode: int, text: str = "", *, halted: bool = False) -> WorkerReport:
    return WorkerReport(rank=rank, exitcode=exitcode, time=1_700_000_000, halted=halted, found=Explanation(words=text))


def ended(rank: int, code: int, found: WorkerReport | None = None) -> Event:
    return Event(rank=rank, kind="ended", code=code, report=found)


def a_round(told: list[str]) -> RoundState:
    names = {0: "node 0 (10.0.0.1)", 1: "node 1 (10.0.0.2)", 2: "node 2 (10.0.0.3)"}
    return RoundState(
        names=names,
        stop_grace=30,
        patience=10,
        hang_report=60,
        hang_timeout=100,
        halt=lambda why, grace, reason: told.append(f"{why} {grace:g}"),
        tell=told.append,
    )


def final(round_: RoundState) -> JobEnded:
    try:
        failures = round_.result()
    except JobEnded as end:
        return end
    raise AssertionError(failures)


def test_a_closed_connection_is_a_cascade_even_if_it_comes_first() -> None:
    cascade = worker_failure("node 0", report(0, 1, CLOSED), seen=1.0)
    cause = worker_failure("node 1", report(1, 1, "ValueError: bad batch"), seen=1.9)
    assert first_causes([cascade, cause]) == [cause]
    assert summarize([cascade, cause]) == (
        "node 1 - rank 1 failed with ValueError: bad batch (exit code 1), at 22:13:20 UTC (node 0 stopped as a result)"
    )


def test_an_abort_while_python_ends_does_not_turn_a_cascade_into_a_cause() -> None:
    cascade = worker_failure("node 0", report(0, -6, CLOSED), seen=1.0)
    killed = worker_failure("node 1", report(1, -9), seen=1.5)
    assert first_causes([cascade, killed]) == [killed]
    assert "SIGKILL" in summarize([cascade, killed])


def test_a_node_found_lost_after_others_failed_in_unknown_words_is_the_cause() -> None:
    strange = worker_failure("node 0", report(0, 1, "RuntimeError: something new"), seen=10.0)
    gone = NodeFailure(node="node 1", what="was lost: no sign of life", seen=12.0, code=ExitCode.LOST, abrupt=True)
    assert first_causes([strange, gone]) == [gone]


def test_an_error_long_before_a_loss_stays_the_cause() -> None:
    error = worker_failure("node 0", report(0, 1, "ValueError: bad batch"), seen=10.0)
    gone = NodeFailure(node="node 1", what="was lost", seen=20.0, code=ExitCode.LOST, abrupt=True)
    assert first_causes([error, gone]) == [error]


def test_a_worker_that_was_told_to_end_is_not_to_blame() -> None:
    for exitcode in (-15, -9, 1, 143):
        assert worker_failure("node 0", report(0, exitcode, halted=True), seen=1.0).weight == Weight.FOLLOWED
    assert worker_failure("node 0", report(0, 7, halted=True), seen=1.0).weight == Weight.EXIT_CODE
    assert worker_failure("node 0", report(0, -11), seen=1.0).weight == Weight.CAUSE


def test_errors_that_another_try_cannot_cure_are_told_from_those_it_may() -> None:
    for text in ("ModuleNotFoundError: No module named 'x'", "ImportError: cannot import name 'y'", "SyntaxError: bad"):
        assert worker_failure("node 0", report(0, 1, text), seen=1.0).not_retryable
    assert "TRAIN_ARGS" in worker_failure("node 0", report(0, 2), seen=1.0).not_retryable
    for found in (report(0, 1, "ValueError: not a SyntaxError: x"), report(0, -9), report(0, 1), report(0, 3)):
        assert not worker_failure("node 0", found, seen=1.0).not_retryable


def test_a_round_is_done_only_when_all_nodes_ended_well() -> None:
    told: list[str] = []
    current = a_round(told)
    for rank in (0, 1):
        current.take(ended(rank, 0), 1.0)
    assert current.running == {2}
    current.take(ended(2, 0), 2.0)
    assert final(current).verdict.code == ExitCode.DONE
    assert told == []


def test_one_failure_halts_all_once_and_the_late_cause_is_found() -> None:
    told: list[str] = []
    current = a_round(told)
    current.take(Event(rank=0, kind="failing"), 1.0)
    current.take(Event(rank=1, kind="failing"), 1.1)
    current.take(ended(0, 1, report(0, 1, CLOSED)), 1.5)
    current.take(ended(1, 1, report(2, -9)), 1.6)
    current.take(ended(2, 1, report(4, -15, halted=True)), 1.7)
    assert told == ["failure 2"]
    assert summarize(current.result()).startswith("node 1 (10.0.0.2) - rank 2 was ended by SIGKILL")


def test_a_stop_wins_over_the_errors_it_causes() -> None:
    told: list[str] = []
    current = a_round(told)
    current.take(Event(rank=1, kind="stop"), 1.0)
    current.take(ended(1, -15, report(1, -15)), 1.2)
    current.take(ended(0, 1, report(0, 1, CLOSED)), 1.3)
    current.take(Event(rank=2, kind="lost", why="its connection closed"), 1.4)
    assert told == ["stop 30"]
    end = final(current).verdict
    assert (end.code, end.text) == (
        ExitCode.STOPPED,
        "stopped on node 1 (10.0.0.2) before the training was done",
    )


def test_a_stop_that_comes_when_all_is_done_does_not_undo_it() -> None:
    current = a_round([])
    current.take(Event(rank=1, kind="stop"), 1.0)
    for rank in (0, 1, 2):
        current.take(ended(rank, 0), 1.2)
    assert final(current).verdict.code == ExitCode.DONE


def test_a_node_that_does_not_end_is_given_up_and_named() -> None:
    current = a_round([])
    current.take(Event(rank=0, kind="failing"), 1.0)
    current.take(ended(0, 1, report(0, 1, CLOSED)), 1.5)
    current.take(ended(1, 1, report(1, -15, halted=True)), 1.5)
    assert current.limit == 1.0 + 2 + 10
    current.give_up(current.limit)
    assert summarize(current.result()).startswith("node 2 (10.0.0.3) does not end")
