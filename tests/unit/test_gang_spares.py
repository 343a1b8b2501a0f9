"""Spares and growth: who has which place in which round."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from app.config.exitcodes import ExitCode
from app.gang.connection import Message
from app.gang.places import assign
from tests.unit.test_gang_coordinator import Job, Node, a_plan, lead, running

RANKS = st.integers(0, 7)


@given(st.integers(1, 7), st.lists(st.sets(RANKS), max_size=6))
def test_a_node_keeps_its_place_while_it_is_here_and_no_place_is_empty_while_a_spare_waits(
    size: int, rounds: list[set[int]]
) -> None:
    owners = [*range(size)]
    for present in rounds:
        here = present | {0}
        before, owners = owners, assign(owners, here)
        assert owners[0] == 0
        assert len({*owners}) == size
        assert all(new == old for old, new in zip(before, owners, strict=True) if old in here)
        placed = [owner for owner in owners if owner in here]
        assert len(placed) == min(size, len(here))


def test_a_place_goes_to_the_first_spare_and_the_lost_node_is_a_spare_when_it_returns() -> None:
    assert assign([0, 1, 2], {0, 2, 3, 4}) == [0, 3, 2]
    assert assign([0, 3, 2], {0, 1, 2, 3, 4}) == [0, 3, 2]
    assert assign([0, 3, 2], {0, 1, 2, 4}) == [0, 1, 2]


def test_a_place_without_a_spare_is_kept_for_its_owner() -> None:
    assert assign([0, 1, 2], {0, 2}) == [0, 1, 2]


async def all_go(nodes: list[Node], round_: int) -> list[Message]:
    """What each was told to start, once all reach each other."""
    for node in nodes:
        while len(node.probes) < round_:
            await asyncio.sleep(0.02)
        node.connection.send("reached", failed=[])
    for node in nodes:
        while not any(each["kind"] in ("go", "wait") and each["round"] == round_ for each in node.heard):
            await asyncio.sleep(0.02)
    told = [next(each for each in node.heard[::-1] if each["kind"] in ("go", "wait")) for node in nodes]
    return [{"kind": each["kind"], "place": each.get("node_rank"), "of": each.get("nnodes")} for each in told]


def go(place: int, of: int) -> Message:
    return {"kind": "go", "place": place, "of": of}


WAIT: Message = {"kind": "wait", "place": None, "of": None}


def end(node: Node, code: int) -> None:
    node.connection.send("ended", code=code, failures=[], finished="", ports=[{"port": 3000}], progress=node.progress)


def test_a_spare_takes_the_place_of_a_lost_node_at_once_and_that_one_is_the_spare_when_it_returns() -> None:
    async def story(job: Job) -> None:
        nodes = [await job.joins(rank) for rank in range(3)]
        assert await all_go(nodes, 1) == [go(0, 2), go(1, 2), WAIT]
        nodes[1].connection.close()
        await nodes[0].hears("halt")
        end(nodes[0], 1)
        assert await all_go([nodes[0], nodes[2]], 2) == [go(0, 2), go(1, 2)]
        back = await job.joins(1, instance_id="another instance", round_=1)
        assert (await back.hears("wait"))["round"] == 2
        end(nodes[0], 0)
        end(nodes[2], 0)
        assert (await back.hears("verdict"))["code"] == ExitCode.DONE

    lead(a_plan(SPARES="1", REJOIN_TIMEOUT="600"), story)


def test_the_death_of_a_spare_is_told_and_ends_no_round() -> None:
    async def story(job: Job) -> None:
        nodes = [await job.joins(rank) for rank in range(3)]
        await all_go(nodes, 1)
        nodes[2].connection.close()
        while not any("node 2 (10.0.0.3), a spare, was lost" in str(each.get("text")) for each in nodes[0].heard):
            await asyncio.sleep(0.02)
        end(nodes[0], 0)
        end(nodes[1], 0)
        assert (await nodes[0].hears("verdict"))["code"] == ExitCode.DONE
        assert "halt" not in nodes[0].kinds()

    lead(a_plan(SPARES="1"), story)


def test_a_start_goes_on_without_the_spares_after_a_moment() -> None:
    async def story(job: Job) -> None:
        nodes = [await job.joins(rank) for rank in (0, 2)]
        assert await all_go(nodes, 1) == [go(0, 2), go(1, 2)]

    lead(a_plan(SPARES="1", START_TIMEOUT="600", HEARTBEAT_TIMEOUT="60"), story)


def test_a_node_that_comes_back_joins_at_the_next_checkpoint_which_is_no_failure() -> None:
    async def story(job: Job) -> None:
        nodes = await running(job, (0, 1))
        late = await job.joins(2)
        late.probes.append("of round 1, which was without it")
        assert "at the next checkpoint" in str((await late.hears("wait"))["text"])
        await asyncio.sleep(3)
        assert "halt" not in nodes[0].kinds()
        nodes[1].progress = "step 100"
        halt = await nodes[0].hears("halt")
        assert (halt["why"], halt["grace"]) == ("grow", 30)
        for node in nodes:
            end(node, 143)
        assert await all_go([*nodes, late], 2) == [go(0, 3), go(1, 3), go(2, 3)]
        assert next(each for each in nodes[0].heard[::-1] if each["kind"] == "go")["failures"] == 0
        # The exit code of a rank that was told to end is no failure, and shortens nobody's grace.
        assert [each["why"] for each in nodes[1].heard if each["kind"] == "halt"] == ["grow"]

    lead(a_plan(MIN_NODES="2", START_TIMEOUT="1", HEARTBEAT_TIMEOUT="60"), story)


def test_a_node_that_was_given_up_is_not_waited_for_again() -> None:
    async def story(job: Job) -> None:
        nodes = await running(job, (0, 1))
        nodes[1].connection.send("failing")
        for node in nodes:
            await node.hears("halt")
            end(node, 1)
        assert await all_go(nodes, 2) == [go(0, 2), go(1, 2)]

    lead(a_plan(MIN_NODES="2", START_TIMEOUT="1", REJOIN_TIMEOUT="600"), story)
