"""Every node's part of doctor, node 0 included: answers node 0's questions and receives the table."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from app.config.exitcodes import ExitCode
from app.doctor.cluster_checks.speed import judge_speed
from app.doctor.cluster_checks.transport import CollectiveCheck, judge_transport
from app.doctor.collect.live import within
from app.doctor.collect.packets import PacketEcho, full_size
from app.doctor.coordinator import DoctorCoordinator
from app.doctor.facts import Facts
from app.doctor.findings import Finding, Row, skipped
from app.doctor.protocol import finding_fields, read_peers, read_row
from app.gang.agreement import gather
from app.gang.connect import NoAnswerError
from app.gang.connection import Connection, Message, ProtocolError, dial, dial_inside, integer, items, listen, text
from app.gang.messages import Say
from app.gang.participant import Participant
from app.gang.services import NodeServices
from app.gang.verdict import JobEnded
from app.plan import Plan

DISK_PATIENCE = 10.0
"""Seconds for a file to be made or seen in the checkpoint folder; node 0 waits longer for the answer."""
HEARTBEAT = 16.0
"""Seconds: measuring keeps a small machine busy."""
Done = TypeVar("Done")
Reduce = Callable[[Facts, Plan, str, int, int], Awaitable[CollectiveCheck]]
"""Runs this node's part of the all-reduce: (facts, plan, run id, place, number of nodes)."""


@dataclass(slots=True, kw_only=True)
class DoctorAnswers:
    """What one node answers. `close` it at the end."""

    facts: Facts
    plan: Plan
    findings: tuple[Finding, ...]
    reduce: Reduce
    rows: list[Row] = field(default_factory=list)
    """The table, once node 0 has told it."""
    _echo: PacketEcho = field(init=False)
    _left: list[Path] = field(default_factory=list)

    def open(self) -> None:
        """Raises OSError."""
        self._echo = PacketEcho(self.plan.network.address)

    def close(self) -> None:
        self._tidy()
        self._echo.close()

    def _results(self) -> dict[str, object]:
        plan, nic = self.plan, self.facts.nic
        return {
            "address": plan.network.address,
            "interface": plan.network.interface,
            "mtu": (nic.mtu or 0) if nic else 0,
            "transport": plan.network.transport,
            "findings": finding_fields(self.findings),
            "port": self._echo.port,
            "key": self._echo.key,
        }

    async def answer(self, question: str, message: Message) -> Mapping[str, object]:
        if question == "clock":
            return {"micros": round(time.time() * 1e6)}
        if question == "results":
            return self._results()
        if question == "row":
            self.rows.append(read_row(message))
            return {}
        if question == "packets":
            return await self._packets(message)
        if question == "leave":
            nonce = text(message, "nonce", 32)
            return {"wrote": int(await self._at_disk(lambda: self._leave(nonce), otherwise=False))}
        if question == "look":
            nonce, upto = text(message, "nonce", 32), integer(message, "upto", 0, 1 << 16)
            seen = await self._at_disk(lambda: self._look(nonce, upto), otherwise=None)
            return {"looked": int(seen is not None), "seen": seen or []}
        if question == "tidy":
            await self._at_disk(self._tidy, otherwise=None)
            return {}
        if question == "all-reduce":
            return await self._reduce(message)
        raise ProtocolError(f"node 0 asks {question!r}, which this version of doctor does not know: use one image")

    async def _packets(self, message: Message) -> Mapping[str, object]:
        peers = read_peers(message)
        sizes = [integer(one, "mtu", 100, 1 << 20) for one in items(message, "peers", 1 << 10)]
        own = self.plan.network.address
        outcomes = await asyncio.gather(
            *(asyncio.to_thread(full_size, own, peer, mtu) for peer, mtu in zip(peers.values(), sizes, strict=True))
        )
        return {"outcomes": [{"rank": rank, "outcome": each} for rank, each in zip(peers, outcomes, strict=True)]}

    async def _at_disk(self, work: Callable[[], Done], otherwise: Done) -> Done:
        """`otherwise` where the checkpoint folder cannot be read, or does not answer: `disk` and `shared` say so."""
        try:
            return await asyncio.to_thread(within, DISK_PATIENCE, work)
        except OSError:
            return otherwise

    def _nonce_file(self, nonce: str, rank: int) -> Path | None:
        """Where a node with this rank leaves its mark, if its checkpoint folder is this node's too."""
        disk = self.facts.live.disk
        if disk is None or disk.failure or not nonce.isalnum():
            return None
        # The folder itself may not exist yet; two that will differ must not look like one for their common parent.
        rest = self.plan.script.checkpoint_dir.relative_to(disk.folder)
        return Path(disk.folder) / f".doctor-{nonce}-{sha256(str(rest).encode()).hexdigest()[:8]}-{rank}"

    def _leave(self, nonce: str) -> bool:
        file = self._nonce_file(nonce, self.plan.nodes.rank)
        if file is None:
            return False
        with contextlib.suppress(OSError):
            file.touch(exist_ok=False)
            self._left.append(file)
            return True
        return False

    def _look(self, nonce: str, upto: int) -> list[dict[str, int]] | None:
        files = {rank: self._nonce_file(nonce, rank) for rank in range(upto + 1)}
        # Listing the folder makes NFS forget what it knew of it.
        places = {file.parent for file in files.values() if file}
        names = {entry.name for place in places for entry in place.iterdir() if entry.name.startswith(".doctor-")}
        return [{"rank": rank} for rank, file in files.items() if file and file.name in names]

    def _tidy(self) -> None:
        for file in self._left:
            with contextlib.suppress(OSError):
                file.unlink()
        self._left.clear()

    async def _reduce(self, message: Message) -> Mapping[str, object]:
        size = integer(message, "nnodes", 1, 1 << 16)
        place = integer(message, "place", 0, size - 1)
        try:
            found = await self.reduce(self.facts, self.plan, text(message, "run_id", 64), place, size)
        except OSError as error:
            found = CollectiveCheck(failure=f"this node could not start it: {error.strerror or error}.")
        speed = tuple(judge_speed(found.speeds, place, self.plan.network.interface))
        if size > 1 and not speed:
            speed = (skipped("speed", "not measured, since the all-reduce failed"),)
        return {"findings": finding_fields((*speed, judge_transport(found)))}


async def meet(
    facts: Facts, plan: Plan, token: bytes, findings: tuple[Finding, ...], say: Say, reduce: Reduce, wait: float
) -> tuple[Row, ...]:
    """Takes part in doctor, on node 0 also leads it; the table. Raises NoAnswerError when node 0 does not come, refuses
    or goes away, and OSError on node 0 where CONTROL_PORT is taken."""
    heartbeat = max(HEARTBEAT, plan.timeouts.heartbeat)
    plan = replace(plan, timeouts=replace(plan.timeouts, start=wait, rejoin=0.0, heartbeat=heartbeat))
    answers = DoctorAnswers(facts=facts, plan=plan, findings=findings, reduce=reduce)
    answers.open()
    try:
        if plan.nodes.rank:
            connect = partial(dial, plan.network.address, plan.nodes.addresses[0], plan.network.control_port)
            return await _take_part(answers, token, say, connect)
        return await _lead(answers, token, say)
    except ProtocolError as error:
        why = f"a node said what this version of doctor does not know ({error}): use one image"
        raise NoAnswerError(why) from None
    except JobEnded as end:
        raise NoAnswerError(end.verdict.text) from None
    finally:
        answers.close()


async def _lead(answers: DoctorAnswers, token: bytes, say: Say) -> tuple[Row, ...]:
    plan, server = answers.plan, None
    coordinator = DoctorCoordinator(plan, token, say)
    if plan.nodes.count > 1:
        network = plan.network
        server = await listen(coordinator.serve, network.address, network.control_port, plan.nodes.count)
    leading = asyncio.ensure_future(coordinator.run())
    own = asyncio.ensure_future(_take_part(answers, token, say, dial_inside(coordinator.serve)))
    try:
        await asyncio.wait([leading, own], return_when=asyncio.FIRST_EXCEPTION)
        if own.done() and own.exception() is not None and not leading.done():
            return own.result()
        return await leading
    finally:
        for task in (leading, own):
            task.cancel()
        await asyncio.gather(leading, own, return_exceptions=True)
        if server:
            server.close()


async def _take_part(
    answers: DoctorAnswers, token: bytes, say: Say, connect: Callable[[], Awaitable[Connection]]
) -> tuple[Row, ...]:
    plan = answers.plan
    services = NodeServices(dial=connect, say=say, answer=answers.answer)
    participant = Participant(
        plan, token, compared(plan), services, job=DoctorCoordinator.job, fixed_ports=_free_master_port(answers)
    )
    verdict = await participant.take_part()
    if verdict.code != ExitCode.DONE:
        raise NoAnswerError(verdict.text)
    return tuple(answers.rows)


def compared(plan: Plan) -> Mapping[str, str]:
    # Names in NODES may stand for different addresses on different nodes.
    addresses = ",".join(plan.nodes.addresses) if all(plan.nodes.addresses) else ""
    return {**gather(plan), **({"addresses of NODES": addresses} if addresses else {})}


def _free_master_port(answers: DoctorAnswers) -> list[int]:
    """Node 0 answers on MASTER_PORT as well, which other nodes must reach; where it is taken, `ports` says so."""
    port = answers.plan.network.master_port
    taken = any(each == port for _, each in answers.facts.live.listening)
    return [] if answers.plan.nodes.rank or taken else [port]
