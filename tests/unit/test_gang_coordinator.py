"""Node 0's hub with nodes that say what they like, in any order: over real sockets, without any launcher."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.exitcodes import ExitCode
from app.engine.outcome import Outcome
from app.gang.connection import MAX_LINE, Connection, Message, items
from app.gang.coordinator import Coordinator
from app.gang.handshake import introduce
from app.gang.mirror.pages import pages
from app.gang.participant import Participant
from app.gang.services import NodeServices, RoundAssignment
from app.gang.verdict import NodeFailure, Verdict
from app.plan import Plan
from tests.unit.launch_facts import card, machine, planned

NODES = "10.0.0.1,10.0.0.2,10.0.0.3"


def a_plan(nodes: int = 3, rank: int = 0, **settings: str) -> Plan:
    listed = ",".join(NODES.split(",")[:nodes])
    host = machine(card("eth0", f"10.0.0.{rank + 1}/24"))
    return planned(host, TRAIN_SCRIPT=__file__, NODES=listed, **settings)


async def no_folder(_question: str, _told: Message) -> Mapping[str, object]:
    """The answer of a node that has no checkpoints to share."""
    (page,) = pages({"problem": ""})
    return {"page": page, "more": False}


@dataclass
class Node:
    """FAKE: the participant's side of one connection, which says what a test lets it say."""

    connection: Connection
    ports: object = ()
    heard: list[Message] = field(default_factory=list)
    closed: bool = False
    progress: str = ""
    probes: list[Any] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                message = await self.connection.receive()
                if message["kind"] == "ask":
                    known: dict[str, Mapping[str, object]] = {
                        "listen": {"ports": self.ports},
                        "progress": {"progress": self.progress},
                    }
                    answer = known.get(str(message["question"])) or await no_folder("checkpoints", message)
                    self.connection.send("answer", number=message["number"], **answer)
                if message["kind"] == "probe":
                    self.probes.append(message["targets"])
                self.heard.append(message)
                self._news.set()
        self.closed = True
        self._news.set()

    async def hears(self, kind: str, seconds: float = 5) -> Message:
        async with asyncio.timeout(seconds):
            while not (found := [message for message in self.heard if message["kind"] == kind]):
                self._news.clear()
                await self._news.wait()
        return found[-1]

    async def dials(self) -> set[object]:
        """The ranks that it is told to try."""
        return {target["rank"] for target in items(await self.hears("probe"), "targets", 100)}

    async def goes(self) -> None:
        """Says that it reaches everybody, and starts."""
        await self.hears("probe")
        self.connection.send("reached", failed=[])

    def kinds(self) -> list[object]:
        return [message["kind"] for message in self.heard if message["kind"] not in ("beat", "ask")]


@dataclass
class Job:
    """A hub, the task that leads it, and what it prints."""

    coordinator: Coordinator
    said: list[str]
    leading: asyncio.Task[Verdict]
    tasks: list[asyncio.Future[None]] = field(default_factory=list)

    async def connect(self) -> Connection:
        here, there = socket.socketpair()
        ends = await asyncio.open_connection(sock=there, limit=MAX_LINE)
        self.tasks.append(asyncio.ensure_future(self.coordinator.serve(*ends)))
        return Connection(*await asyncio.open_connection(sock=here, limit=MAX_LINE))

    async def joins(
        self, rank: int, instance_id: str = "", facts: Mapping[str, str] | None = None, round_: int = 0, nnodes: int = 3
    ) -> Node:
        node = Node(await self.connect(), [{"port": 1000 + rank}])
        hello = {
            "run": self.coordinator.plan.run_name,
            "rank": rank,
            "job": "training",
            "host": "vm",
            "instance_id": instance_id or f"instance {rank}",
            "key": "k",
            "facts": dict(facts or {"torch": "2"}),
            "round": round_,
            "failures": 0,
            "progress": "",
        }
        await introduce(node.connection, b"", hello)
        self.tasks.append(asyncio.ensure_future(node.read()))
        return node


def lead(plan: Plan, story: Callable[[Job], Awaitable[None]]) -> None:
    """Runs a hub with `plan` and tells the story beside it."""

    async def both() -> None:
        said: list[str] = []
        coordinator = Coordinator(plan, b"", said.append)
        job = Job(coordinator, said, asyncio.ensure_future(coordinator.run()))
        try:
            async with asyncio.timeout(30):
                await story(job)
            if job.leading.done() and not job.leading.cancelled():
                assert job.leading.exception() is None
        finally:
            job.leading.cancel()

    asyncio.run(both())


async def running(job: Job, ranks: Sequence[int] = (0, 1, 2)) -> list[Node]:
    """Nodes that have all been told to start."""
    nodes = [await job.joins(rank, nnodes=job.coordinator.plan.nodes.count) for rank in ranks]
    for node in nodes:
        await node.goes()
    for node in nodes:
        await node.hears("go")
    return nodes


def test_a_node_that_dies_in_the_reach_test_is_lost_and_another_round_follows() -> None:
    async def story(job: Job) -> None:
        nodes = [await job.joins(rank) for rank in range(3)]
        for node in nodes:
            await node.hears("probe")
        nodes[0].connection.send("reached", failed=[])
        # Its peer may tell of the refused connection before its own connection is seen to end.
        nodes[1].connection.send("reached", failed=[{"rank": 2, "port": 1002, "why": "connection refused"}])
        nodes[2].connection.close()
        while not any("node 2 (10.0.0.3) was lost" in str(message.get("text")) for message in nodes[0].heard):
            await asyncio.sleep(0.02)
        assert not job.leading.done()
        again = await job.joins(2, instance_id="another instance")
        assert await again.hears("probe")

    lead(a_plan(), story)


@pytest.mark.parametrize("round_", [0, 6])
def test_a_blocked_pair_is_the_end_before_the_first_round_and_another_try_in_a_later_one(round_: int) -> None:
    async def story(job: Job) -> None:
        nodes = [await job.joins(rank, round_=round_, nnodes=2) for rank in range(2)]
        for node in nodes:
            await node.hears("probe")
        nodes[0].connection.send("reached", failed=[{"rank": 1, "port": 1001, "why": "no answer"}])
        nodes[1].connection.send("reached", failed=[])
        if not round_:
            assert (await nodes[1].hears("verdict"))["code"] == ExitCode.UNREACHABLE
            return
        await asyncio.sleep(0.8)
        assert "verdict" not in nodes[1].kinds()
        assert "All nodes start again (restart 1 of 3)" in str((await nodes[1].hears("news"))["text"])

    lead(a_plan(2), story)


def test_reach_is_proven_anew_to_who_came_back_and_between_all_after_a_second_failure_in_a_row() -> None:
    async def round_fails(nodes: Sequence[Node], ports: Sequence[int]) -> list[set[object]]:
        """Whom each node is told to dial before the round that follows."""
        for node in nodes:
            node.heard.clear()
        for node, port in zip(nodes, ports, strict=True):
            node.connection.send("ended", code=1, failures=[], finished="", ports=[{"port": port}], progress="")
        dialled = [await node.dials() for node in nodes]
        for node in nodes:
            node.connection.send("reached", failed=[])
        for node in nodes:
            await node.hears("go")
        return dialled

    async def story(job: Job) -> None:
        nodes = await running(job)
        assert await round_fails(nodes, (1, 2, 3)) == [set(), set(), set()]
        assert await round_fails(nodes, (4, 5, 6)) == [{1, 2}, {0, 2}, {0, 1}]

    async def with_a_newcomer(job: Job) -> None:
        nodes = await running(job)
        for node in nodes:
            node.heard.clear()
        nodes[2].connection.close()
        for node in nodes[:2]:
            node.connection.send("ended", code=0, failures=[], finished="", ports=[{"port": 7}], progress="")
        nodes[2] = await job.joins(2, instance_id="another", round_=1)
        assert [await node.dials() for node in nodes] == [{2}, {2}, {0, 1}]

    lead(a_plan(), story)
    lead(a_plan(), with_a_newcomer)


def test_a_node_that_disagrees_and_leaves_does_not_let_the_others_start_without_the_rest() -> None:
    async def story(job: Job) -> None:
        first = await job.joins(0)
        odd = await job.joins(1, facts={"torch": "9"})
        await asyncio.sleep(0.3)
        odd.connection.close()
        await asyncio.sleep(2.5)
        assert "probe" not in first.kinds()
        await job.joins(1)
        await job.joins(2)
        assert await first.hears("probe")

    lead(a_plan(), story)


def test_a_stop_on_a_node_that_waits_for_the_next_round_stops_the_job() -> None:
    async def story(job: Job) -> None:
        nodes = await running(job, (0, 1))
        late = await job.joins(2)
        await late.hears("wait")
        late.connection.send("stop")
        assert (await nodes[0].hears("halt"))["why"] == "stop"
        for node in nodes:
            node.connection.send("ended", code=143, failures=[], finished="", progress="")
        for node in (*nodes, late):
            assert (await node.hears("verdict"))["code"] == ExitCode.STOPPED

    lead(a_plan(MIN_NODES="2", START_TIMEOUT="1"), story)


def test_everybody_who_comes_in_the_moment_of_a_refusal_is_told_it() -> None:
    async def story(job: Job) -> None:
        first = [await job.joins(0), await job.joins(1)]
        rest = await asyncio.gather(job.joins(1, instance_id="twin"), job.joins(2), job.joins(3, nnodes=4))
        for node in (*first, *rest):
            await asyncio.wait(
                [asyncio.ensure_future(node.hears(kind)) for kind in ("verdict", "refuse")],
                return_when=asyncio.FIRST_COMPLETED,
            )
            node.connection.close()
        started = time.monotonic()
        verdict = await job.leading
        assert verdict.code == ExitCode.DISAGREE
        assert time.monotonic() - started < 3

    lead(replace(a_plan(), nodes=replace(a_plan().nodes, addresses=(*NODES.split(","), "10.0.0.4"))), story)


def test_newcomers_that_are_refused_in_a_running_round_are_sent_away_and_fill_neither_sockets_nor_log() -> None:
    async def story(job: Job) -> None:
        await running(job, (0, 1))
        strangers = [await job.joins(1, instance_id=f"stranger {number}", nnodes=2) for number in range(30)]
        for node in strangers:
            assert (await node.hears("refuse"))["code"] == ExitCode.DISAGREE
        await asyncio.sleep(0.1)
        assert all(node.closed for node in strangers)
        assert len(job.said) <= 2

    lead(a_plan(2), story)


def test_a_node_that_comes_again_before_its_old_connection_is_seen_to_end_keeps_its_seat() -> None:
    async def story(job: Job) -> None:
        old = await job.joins(1)
        new = await job.joins(1)
        first, last = await job.joins(0), await job.joins(2)
        await new.hears("probe")
        assert old.closed
        for node in (first, new, last):
            node.connection.send("reached", failed=[])
        for node in (first, new, last):
            await node.hears("go")
        assert not [message for message in first.heard if "was lost" in str(message.get("text"))]

    lead(a_plan(), story)


@pytest.mark.parametrize("said", ["reached", "ended", "failing", "stalled", "stop", "beat", "hello"])
def test_any_message_at_any_time_is_no_crash_of_node_0(said: str) -> None:
    fields: dict[str, object] = {
        "failed": [{"rank": 2, "port": 1, "why": "x"}],
        "code": 1,
        "failures": [{"rank": 5, "exitcode": 1, "text": "x", "time": 1, "halted": False}],
        "progress": "x",
        "ranks": [{"rank": 1, "seconds": 9, "at": "x", "collective": "", "group": "", "sequence": 1}],
    }

    async def story(job: Job) -> None:
        nodes = [await job.joins(0, nnodes=2)]
        nodes[0].connection.send(said, **fields)
        nodes.append(await job.joins(1, nnodes=2))
        for _ in range(4):
            await asyncio.sleep(0.15)
            for node in nodes:
                node.connection.send(said, **fields)
        if job.leading.done():
            assert job.leading.result().code in (ExitCode.STOPPED, ExitCode.DONE)

    lead(a_plan(2), story)


class Engine:
    """FAKE torchrun: runs until it is ended."""

    def __init__(self, *, broken: bool = False) -> None:
        self.ended = asyncio.Event()
        self.broken = broken

    async def watch(self, failing: Callable[[], None]) -> Outcome:
        await self.ended.wait()
        if self.broken:
            raise ValueError("half a line")
        return Outcome(code=143)

    async def end(self, *, gently: bool, grace: float) -> None:
        await asyncio.sleep(min(grace, 0.5))
        self.ended.set()

    def kill(self) -> None:
        self.ended.set()


def a_participant(
    plan: Plan, dial: Callable[[], Awaitable[Connection]], engine: Engine | OSError, launched: asyncio.Event
) -> Participant:
    def launch(_: RoundAssignment) -> Engine:
        launched.set()
        if isinstance(engine, OSError):
            raise engine
        return engine

    async def refresh() -> None: ...

    services = NodeServices(
        dial=dial,
        answer=no_folder,
        launch=launch,
        clean=lambda: 0,
        progress=lambda: "",
        stalls=lambda: (),
        refresh=refresh,
        say=lambda _: None,
        holder=lambda _: "",
        state=lambda _state, _round: None,
    )
    return Participant(plan, b"", {"torch": "2"}, services)


def test_a_node_whose_job_was_being_stopped_when_node_0_vanished_has_stopped_too() -> None:
    async def story(job: Job) -> None:
        plan, launched, gone = a_plan(2, 1), asyncio.Event(), list[bool]()

        async def dial() -> Connection:
            if gone:
                raise ConnectionRefusedError(111, "connection refused")
            return await job.connect()

        # The addresses are made up, so nothing can listen on them.
        participant = a_participant(
            replace(plan, network=replace(plan.network, address="127.0.0.1")), dial, Engine(), launched
        )
        part = asyncio.ensure_future(participant.take_part())
        first = await job.joins(0, nnodes=2)
        async with asyncio.timeout(20):
            while not launched.is_set():
                await asyncio.sleep(0.05)
        first.connection.send("stop")
        await asyncio.sleep(0.2)
        gone.append(True)
        for node in job.coordinator.membership.all().values():
            node.connection.abort()
        job.leading.cancel()
        assert (await part).code == ExitCode.STOPPED

    async def without_reach(job: Job) -> None:
        job.coordinator._verify_connectivity = no_reach  # type: ignore[method-assign]
        await story(job)

    async def no_reach() -> list[NodeFailure]:
        return []

    lead(a_plan(2), without_reach)


ORDERS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["probe", "go", "halt", "news", "verdict", "refuse", "beat", "open", ""])},
    optional={
        name: st.none()
        | st.integers()
        | st.text(max_size=9)
        | st.lists(st.dictionaries(st.text(max_size=4), st.integers()))
        for name in ("targets", "round", "run_id", "node_rank", "nnodes", "failures", "grace", "why", "text", "code")
    },
)


@given(st.lists(ORDERS, max_size=6))
def test_whatever_node_0_says_a_node_obeys_or_hangs_up(orders: list[dict[str, object]]) -> None:
    async def told() -> Verdict | None:
        here, there = socket.socketpair()
        connection = Connection(*await asyncio.open_connection(sock=here, limit=MAX_LINE))
        node0 = Connection(*await asyncio.open_connection(sock=there, limit=MAX_LINE))
        participant = a_participant(a_plan(2, 1), lambda: asyncio.sleep(0, connection), Engine(), asyncio.Event())
        for order in orders:
            node0.send(str(order["kind"]), **{name: value for name, value in order.items() if name != "kind"})
        node0.close()
        async with asyncio.timeout(5):
            return await participant._follow(connection)

    verdict = asyncio.run(told())
    assert verdict is None or verdict.text is not None


def test_a_torchrun_whose_last_words_are_torn_has_ended_all_the_same() -> None:
    async def story(job: Job) -> None:
        engine, launched = Engine(broken=True), asyncio.Event()
        plan = a_plan(1, MAX_RESTARTS="0")
        participant = a_participant(
            replace(plan, network=replace(plan.network, master_port=free_port())), job.connect, engine, launched
        )
        part = asyncio.ensure_future(participant.take_part())
        await launched.wait()
        engine.ended.set()
        verdict = await part
        assert verdict.code == ExitCode.TRAINING
        assert "half a line" in verdict.text

    lead(a_plan(1, MAX_RESTARTS="0"), story)


def test_a_torchrun_that_cannot_be_started_is_this_nodes_failure_and_no_lost_node() -> None:
    async def story(job: Job) -> None:
        plan = a_plan(1, MAX_RESTARTS="0")
        plan = replace(plan, network=replace(plan.network, master_port=free_port()))
        too_long = OSError(7, "Argument list too long")
        verdict = await a_participant(plan, job.connect, too_long, asyncio.Event()).take_part()
        assert verdict.code == ExitCode.TRAINING
        assert "node 0 (10.0.0.1) - torchrun failed with OSError: [Errno 7] Argument list too long" in verdict.text

    lead(a_plan(1, MAX_RESTARTS="0"), story)


def free_port() -> int:
    with socket.create_server(("", 0)) as ear:
        return int(ear.getsockname()[1])
