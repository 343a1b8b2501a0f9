"""The reach test as node 0 follows it, without any network."""

from app.gang.connectivity import SETTLE, Connectivity
from app.gang.messages import Event

REFUSED = "connection refused"


def state(*ranks: int) -> Connectivity:
    return Connectivity(ranks=list(ranks), started=100.0, here=set(ranks))


def reached(rank: int, *blocked: tuple[int, int, str]) -> Event:
    return Event(rank=rank, kind="reached", blocked=blocked)


def test_it_is_done_as_soon_as_all_have_answered_well() -> None:
    test = state(0, 1)
    test.take(reached(0), 100.1)
    assert (test.done(100.1), test.until) == (False, test.limit)
    test.take(reached(1), 100.2)
    assert test.done(100.2)
    assert (test.blocked, test.lost) == ([], {})


def test_a_node_that_does_not_answer_is_waited_for_until_the_limit() -> None:
    test = state(0, 1)
    test.take(reached(0), 100.1)
    assert not test.done(test.limit - 0.1)
    assert test.done(test.limit)
    assert test.pending == {1}


def test_a_blocked_pair_is_told_with_all_its_ports_after_a_moment() -> None:
    test = state(0, 1)
    test.take(reached(0, (1, 4001, REFUSED), (1, 4002, REFUSED)), 100.1)
    test.take(reached(1), 100.2)
    assert not test.done(100.2)
    assert test.done(test.until)
    assert test.until == 100.2 + SETTLE
    [pair] = test.blocked
    assert (pair.source, pair.target, pair.ports, pair.connects) == (0, 1, (4001, 4002), False)


def test_a_node_that_dies_meanwhile_is_lost_and_its_ports_are_not_blocked() -> None:
    test = state(0, 1)
    test.take(reached(0, (1, 4001, REFUSED)), 100.1)
    test.take(Event(rank=1, kind="lost", why="its connection closed"), 100.2)
    test.here.discard(1)
    assert test.done(100.2 + SETTLE)
    assert test.lost == {1: ("its connection closed", 100.2)}
    assert test.blocked == []


def test_what_others_say_meanwhile_is_no_answer() -> None:
    test = state(0, 2)
    for event in (reached(1), Event(rank=0, kind="joined"), Event(rank=2, kind="ended")):
        test.take(event, 100.1)
    assert test.pending == {0, 2}


def test_on_a_large_cluster_one_random_port_each_is_dialled_and_master_port_on_node_0() -> None:
    small, large = state(0, 1), state(*range(40))
    assert (small.ports_of(0), small.ports_of(1)) == (3, 2)
    assert (large.ports_of(0), large.ports_of(1)) == (2, 1)
    assert len(large.peers(20)) < 10


def test_nodes_that_stayed_connected_do_not_try_each_other_again_and_try_whoever_came_anew() -> None:
    test = Connectivity(ranks=[0, 1, 2], started=100.0, known=frozenset({0, 1}))
    assert [test.peers(rank) for rank in range(3)] == [[2], [2], [0, 1]]
