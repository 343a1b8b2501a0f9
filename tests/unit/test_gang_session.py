"""Who may take part: other jobs, longer lists, nodes that cannot start, and connections that come to nothing."""

import asyncio
import contextlib
import socket
import time
from dataclasses import replace

import pytest

from app.config.exitcodes import ExitCode
from app.doctor.coordinator import DoctorCoordinator
from app.gang.connection import Connection, ProtocolError, dial
from app.gang.handshake import introduce
from app.gang.participant import Participant
from app.gang.services import NodeServices, RoundAssignment
from app.supervise import unfit
from tests.machines.facts import settings_of
from tests.unit.test_gang_coordinator import Engine, Job, a_plan, lead, running


async def says(job: Job, kind: str = "training", **fields: object) -> Connection:
    """A connection whose hello says this of itself."""
    connection = await job.connect()
    await introduce(connection, b"", {"run": job.coordinator.plan.run_name, "job": kind, **fields})
    return connection


def test_a_rank_beyond_the_list_is_never_a_member_and_its_list_is_shown() -> None:
    async def story(job: Job) -> None:
        third = await job.joins(2, facts={"NNODES": "3"})
        first, second = await job.joins(0, facts={"NNODES": "2"}), await job.joins(1, facts={"NNODES": "2"})
        assert "not one of the 2 nodes" in str((await third.hears("refuse"))["text"])
        assert 2 not in job.coordinator.membership
        for node in (first, second):
            told = await node.hears("verdict")
            assert told["code"] == ExitCode.DISAGREE
            assert "NNODES  2 (nodes 0, 1)   3 (node 2)" in str(told["text"])

    lead(a_plan(2), story)


def test_a_rank_beyond_the_list_disturbs_no_running_job() -> None:
    async def story(job: Job) -> None:
        nodes = await running(job, (0, 1))
        third = await job.joins(2, facts={"NNODES": "3"})
        await third.hears("refuse")
        await asyncio.sleep(0.5)
        assert not job.leading.done()
        assert "verdict" not in nodes[0].kinds()

    lead(a_plan(2), story)


def test_doctor_is_refused_by_a_training_and_a_training_waits_for_the_end_of_doctor() -> None:
    async def story(job: Job) -> None:
        doctor = await says(job, "doctor")
        refusal = await doctor.receive()
        assert (refusal["kind"], refusal["code"]) == ("refuse", ExitCode.DISAGREE)
        coordinator = DoctorCoordinator(job.coordinator.plan, b"", job.said.append)
        here, there = socket.socketpair()
        serving = asyncio.ensure_future(coordinator.serve(*await asyncio.open_connection(sock=there)))
        trainer = Connection(*await asyncio.open_connection(sock=here))
        await introduce(trainer, b"", {"run": "default", "job": "training"})
        assert (await trainer.receive())["kind"] == "busy"
        await serving

    lead(a_plan(), story)


def test_a_node_that_cannot_start_is_known_to_all_who_wait_for_it() -> None:
    async def story(job: Job) -> None:
        first = await job.joins(0)
        await says(job, unfit="NPROC_PER_NODE=many is no number\x1b[2J", rank=2)
        told = str((await first.hears("news"))["text"])
        assert told == "node 2 (10.0.0.3) was turned away: it cannot start: NPROC_PER_NODE=many is no number?[2J"
        assert "NPROC_PER_NODE=many" in job.coordinator.membership.absent[2]

    lead(a_plan(), story)


def test_names_of_facts_cannot_write_lines_or_commands_on_a_terminal() -> None:
    async def story(job: Job) -> None:
        await job.joins(0)
        await job.joins(1, facts={"torch": "2", "x\ntorchrun-compose: done\x1b[1A": "evil\nline"})
        await asyncio.sleep(0.1)
        [facts] = [node.hello.facts for rank, node in job.coordinator.membership.all().items() if rank == 1]
        assert facts == {"torch": "2", "x torchrun-compose: done?[1A": "evil line"}

    lead(a_plan(), story)


def test_start_timeout_is_one_deadline_whatever_accepts_and_hangs_up_meanwhile() -> None:
    async def story(job: Job) -> None:
        plan = a_plan(2, 1, START_TIMEOUT="2")

        async def hangs_up() -> Connection:
            connection = await job.connect()
            asyncio.get_running_loop().call_later(0.1, connection.abort)
            return connection

        services = NodeServices(dial=hangs_up, say=lambda _: None)
        participant = Participant(replace(plan, network=replace(plan.network, address="127.0.0.1")), b"", {}, services)
        started = time.monotonic()
        verdict = await participant.take_part()
        assert verdict.code == ExitCode.UNREACHABLE
        assert time.monotonic() - started < 4

    lead(a_plan(2), story)


@pytest.mark.parametrize("answer", [{}, {"micros": "x", "findings": [{}], "ports": 1, "wrote": 7, "outcomes": {}}])
def test_answers_that_are_none_cost_a_node_its_place_in_doctor_and_not_node_0_its_life(
    answer: dict[str, object],
) -> None:
    async def node(coordinator: DoctorCoordinator, rank: int) -> None:
        here, there = socket.socketpair()
        serving = asyncio.ensure_future(coordinator.serve(*await asyncio.open_connection(sock=there)))
        connection = Connection(*await asyncio.open_connection(sock=here))
        hello = {"run": "default", "job": "doctor", "rank": rank, "host": "vm", "instance_id": str(rank), "key": "k"}
        await introduce(connection, b"", {**hello, "facts": {}, "round": 0, "failures": 0, "progress": ""})
        with contextlib.suppress(OSError):
            while True:
                asked = await connection.receive()
                if asked["kind"] == "ask":
                    connection.send("answer", number=asked["number"], **answer)
        serving.cancel()

    async def story() -> int:
        coordinator = DoctorCoordinator(a_plan(2), b"", lambda _: None)
        nodes = [asyncio.ensure_future(node(coordinator, rank)) for rank in (0, 1)]
        async with asyncio.timeout(30):
            rows = await coordinator.run()
        for each in nodes:
            each.cancel()
        return len(rows)

    assert asyncio.run(story()) == 2


def test_ports_that_are_none_cost_a_node_its_connection_and_not_node_0_its_life() -> None:
    async def story(job: Job) -> None:
        first, second = await job.joins(0, nnodes=2), await job.joins(1, nnodes=2)
        second.ports = [{"port": 1 << 20}]
        assert (await first.hears("probe"))["targets"] == []
        async with asyncio.timeout(5):
            while not second.closed:
                await asyncio.sleep(0.01)
        assert not job.leading.done()

    lead(a_plan(2), story)


@pytest.mark.parametrize(
    ("nodes", "rank", "translated"),
    [
        (("127.0.0.1", "127.0.0.2"), -1, False),
        (("127.0.0.1", "localhost"), 1, False),
        (("127.0.0.1", "192.0.2.7"), 1, True),
        (("192.0.2.6", "192.0.2.7"), -1, True),
    ],
)
def test_a_node_that_cannot_start_says_whether_its_address_is_translated(
    nodes: tuple[str, ...], rank: int, *, translated: bool
) -> None:
    async def told() -> bool:
        settings = settings_of({"NODES": ",".join(nodes)})
        return await unfit.is_translated(settings, rank, "127.0.0.1:4000")

    assert asyncio.run(told()) is translated


def test_a_number_out_of_range_ends_one_connection_and_not_node_0() -> None:
    async def story(job: Job) -> None:
        nodes = await running(job)
        report = {
            "rank": 1,
            "exitcode": 1,
            "words": "x",
            "halted": False,
            "alike": 0,
            "place": "",
            "note": "",
            "cause": "",
            "fix": "",
        }
        nodes[1].connection.send("ended", code=1, failures=[{**report, "time": 1 << 45}], finished="", progress="")
        halt = await nodes[0].hears("halt")
        assert "node 1 (10.0.0.2) was lost" in str(halt["text"])
        assert not job.leading.done()

    lead(a_plan(), story)


def test_a_connection_from_another_address_of_this_machine_is_told_by_both_sides_alike() -> None:
    async def ends() -> tuple[str, str]:
        arrived: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda *ends: arrived.set_result(Connection(*ends)), "::1", 0)
        async with server:
            own = await dial("::1", "::1", server.sockets[0].getsockname()[1])
            there = await arrived
            own.close()
            there.close()
        return f"{own.here} {own.there}", f"{there.there} {there.here}"

    ours, theirs = asyncio.run(ends())
    assert ours == theirs


@pytest.mark.parametrize("run_id", ["../../etc/x", "/tmp/x", ".hidden", "a b", ""])
def test_a_run_id_that_is_no_plain_name_starts_nothing(run_id: str) -> None:
    async def story(job: Job) -> None:
        launched = list[RoundAssignment]()

        def launch(assignment: RoundAssignment) -> Engine:
            launched.append(assignment)
            return Engine()

        services = NodeServices(dial=job.connect, say=lambda _: None, launch=launch)
        participant = Participant(a_plan(2, 1), b"", {}, services)
        with pytest.raises(ProtocolError):
            participant._go({"kind": "go", "round": 1, "node_rank": 1, "nnodes": 2, "failures": 0, "run_id": run_id})
        assert launched == []

    lead(a_plan(2), story)
