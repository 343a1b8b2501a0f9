"""Whom the verdict blames, where several nodes failed at once and few of them say why."""

import pytest

from app.config.exitcodes import ExitCode
from app.engine.outcome import Explanation
from app.gang.messages import WorkerReport
from app.gang.verdict import (
    NodeFailure,
    Weight,
    first_causes,
    is_unclear,
    left_alone,
    summarize,
    suspect_self,
    worker_failure,
)

CLOSED = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:44775"


def failure(node: int, exitcode: int, text: str = "", *, seen: float = 1.0, **more: object) -> NodeFailure:
    found = {name: more.pop(name) for name in ("note", "place") if name in more}
    fields = {"rank": node, "exitcode": exitcode, "time": 0.0, "halted": False, **more}
    explanation = Explanation(words=text, **found)  # type: ignore[arg-type]  # by name
    report = WorkerReport(**fields, found=explanation)  # type: ignore[arg-type]  # by name
    return worker_failure(f"node {node}", report, seen)


def blamed(*failures: NodeFailure) -> tuple[list[str], bool]:
    causes = first_causes(failures)
    return [each.node for each in causes], is_unclear(causes)


def test_words_beat_silence_that_came_first() -> None:
    silent, spoken = failure(0, 1, seen=1.0), failure(1, 1, "ValueError: bad batch", seen=2.5)
    assert blamed(silent, spoken) == (["node 1"], False)


def test_an_exit_code_of_its_own_beats_a_silent_1_that_came_first() -> None:
    assert blamed(failure(0, 1, seen=1.0), failure(1, 3, seen=2.5)) == (["node 1"], False)


def test_silence_beats_words_that_only_say_that_a_peer_has_gone() -> None:
    assert blamed(failure(0, 1, CLOSED, seen=1.0), failure(1, 1, seen=2.5)) == (["node 1"], False)


def test_where_only_silent_ends_come_together_all_are_candidates() -> None:
    failures = [failure(0, 1, seen=1.0), failure(1, 1, seen=1.2)]
    assert blamed(*failures) == (["node 0", "node 1"], True)
    assert summarize(failures).startswith(
        "cause unclear: node 0 - rank 0 ended with exit code 1; node 1 - rank 1 ended"
    )
    assert "as a result" not in summarize(failures)


def test_a_silent_end_long_before_the_others_is_the_cause() -> None:
    assert blamed(failure(0, 1, seen=3.0), failure(1, 1, seen=1.0)) == (["node 1"], False)


def test_where_all_only_lost_their_peers_no_node_is_the_culprit() -> None:
    assert blamed(failure(0, 1, CLOSED)) == (["node 0"], True)
    assert blamed(failure(0, 1, CLOSED), failure(1, 1, CLOSED)) == (["node 0", "node 1"], True)


def test_ranks_that_are_killed_together_are_all_named_and_none_followed() -> None:
    failures = [failure(0, -9, seen=1.0, alike=1), failure(1, -9, seen=1.1)]
    assert blamed(*failures) == (["node 0", "node 1"], False)
    told = summarize(failures)
    assert "node 0 - rank 0 and 1 other rank of the node were ended by SIGKILL" in told
    assert "as a result" not in told


def test_a_bug_that_all_ranks_have_is_told_once() -> None:
    failures = [failure(0, 1, "ValueError: bad batch"), failure(1, 1, "ValueError: bad batch", seen=1.1)]
    assert summarize(failures).endswith("(node 1 failed alike)")
    assert blamed(failure(0, 2), failure(1, 2)) == (["node 0"], False)


def test_an_abort_without_words_says_less_than_any_other_signal_and_more_than_a_silent_1() -> None:
    assert blamed(failure(0, -6, seen=1.0), failure(1, -11, seen=2.0)) == (["node 1"], False)
    assert blamed(failure(0, 1, seen=1.0), failure(1, 1, seen=1.1), failure(2, -6, seen=1.2)) == (["node 2"], False)
    assert blamed(failure(0, -6, seen=1.0), failure(1, -6, seen=1.2)) == (["node 0", "node 1"], True)
    late = failure(2, -6, seen=1.2, halted=True)
    assert blamed(failure(0, 1, seen=1.0), failure(1, 1, seen=1.1), late) == (["node 2"], False)
    # On its way out after it was told to end: gloo's threads.
    assert blamed(failure(0, -6, seen=3.0, halted=True), failure(1, 1, seen=1.0)) == (["node 1"], False)


def lost(node: int, *, silent: bool = True) -> NodeFailure:
    return NodeFailure(node=f"node {node}", what="was lost", seen=9.0, code=ExitCode.LOST, abrupt=True, silent=silent)


@pytest.mark.parametrize(
    ("failures", "others", "link", "blames"),
    [
        ([lost(1), lost(2)], 2, "", "node 0"),
        ([lost(1)], 1, "", "node 0"),
        ([lost(1)], 2, "", "node 1"),
        ([lost(1)], 2, "its link eth0 is down", "node 0"),
        ([lost(1, silent=False), lost(2, silent=False)], 2, "", "node 1"),
    ],
)
def test_who_hears_nobody_suspects_itself(failures: list[NodeFailure], others: int, link: str, blames: str) -> None:
    causes = first_causes(suspect_self(failures, "node 0", others, link))
    assert causes[0].node == blames
    assert causes[0].code == ExitCode.LOST
    assert link in causes[0].what


def test_of_two_nodes_that_do_not_hear_each_other_none_is_called_guilty() -> None:
    [cut] = suspect_self([lost(1)], "node 0", 1, "")
    assert cut.what == "no longer hears node 1: the link of one of the two is cut"


def test_only_an_error_in_its_own_words_can_be_the_same_as_before() -> None:
    first = failure(0, 1, "ValueError: batch 7", place="train.py, line 5")
    again = failure(1, 1, "ValueError: batch 9", place="train.py, line 5")
    assert first.signature == again.signature
    assert first.signature != failure(0, 1, "ValueError: batch 7", place="train.py, line 6").signature
    for wordless in (failure(0, -9), failure(0, 1), failure(0, 1, CLOSED)):
        assert wordless.signature == ("", "")


def test_a_rank_whose_peer_had_finished_is_no_crash_but_has_more_steps() -> None:
    [alone] = left_alone([failure(0, 1, CLOSED)], {"node 1": "all_reduce #3"})
    assert "node 1 had finished after all_reduce #3 while it waited in a collective: unequal numbers" in alone.what
    assert not is_unclear([alone])


def test_a_finished_peer_explains_no_error_in_its_own_words() -> None:
    failures = [failure(0, 1, "ValueError: bad batch")]
    assert left_alone(failures, {"node 1": "all_reduce #3"}) == failures


def test_a_kill_for_memory_is_told_as_one() -> None:
    assert failure(0, -9, note="the kernel killed it: out of memory").what.endswith(
        "was ended by SIGKILL (the kernel killed it: out of memory)"
    )


def test_a_worker_that_was_told_to_end_followed() -> None:
    assert failure(0, 1, halted=True).weight == Weight.FOLLOWED
