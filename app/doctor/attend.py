"""Every node's part of the meeting, node 0 included: come, answer what node 0 asks, and hear the table."""

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from app.doctor.cluster_checks.transport import Collective
from app.doctor.collect import meter
from app.doctor.collect.look import within
from app.doctor.facts import Facts
from app.doctor.findings import Finding, Row
from app.doctor.meeting import ANSWER, BEAT, Meeting, run_of
from app.doctor.talk import read_findings, read_peer, told_collective, told_facts, told_findings
from app.gang import connectivity
from app.gang.agreement import gather, host_id
from app.gang.connect import NobodyError, Waiting, arrive
from app.gang.connection import (
    MAX_LINE,
    Message,
    UntrustedError,
    Wire,
    WireError,
    integer,
    introduce,
    items,
    listen,
    text,
)
from app.gang.messages import Say
from app.plan import Plan
from app.plan.resource_checks import speed_of

SILENCE = 8 * BEAT
DISK_PATIENCE = 10.0
"""Seconds for a file to be made or seen in the checkpoint folder; node 0 waits longer for the answer."""
Done = TypeVar("Done")
Reduce = Callable[[Facts, Plan, str, int, int], Awaitable[Collective]]
"""Runs this node's part of the all-reduce: (facts, plan, run id, place, number of nodes)."""


@dataclass(slots=True, kw_only=True)
class Attendant:
    """One node at the meeting."""

    facts: Facts
    plan: Plan
    token: bytes
    findings: tuple[Finding, ...]
    say: Say
    reduce: Reduce
    life: str = field(default_factory=lambda: secrets.token_hex(8))
    _answering: connectivity.Answering = field(init=False)
    _meter: meter.Meter = field(init=False)
    _left: list[Path] = field(default_factory=list)

    async def attend(self, dial: Callable[[], Awaitable[Wire]], wait: float) -> tuple[Row, ...]:
        """The table of all nodes. Raises NobodyError when node 0 does not come, refuses, or goes away."""
        self._answering = connectivity.Answering(secrets.token_hex(16))
        await self._answering.open(self.plan.network.address, self._free_master_port())
        self._meter = meter.Meter(self.plan.network.address)
        try:
            wire = await self._join(dial, wait)
            try:
                return await self._obey(wire)
            finally:
                wire.close()
        finally:
            self._tidy()
            self._meter.close()
            self._answering.close()

    def _free_master_port(self) -> list[int]:
        """Node 0 answers on MASTER_PORT as well, which other nodes must reach; where it is taken, `ports` says so."""
        taken = any(port == self.plan.network.master_port for _, port in self.facts.look.listening)
        return [] if self.plan.nodes.rank or taken else [self.plan.network.master_port]

    async def _join(self, dial: Callable[[], Awaitable[Wire]], wait: float) -> Wire:
        node0 = f"node 0 ({self.plan.nodes.addresses[0]} port {self.plan.network.control_port})"
        waiting = Waiting(wait, self.say)
        try:
            wire = await arrive(lambda: self._greet(dial), node0, waiting, _rest)
        except UntrustedError as error:
            raise NobodyError(str(error)) from None
        except NobodyError as error:
            raise NobodyError(f"{node0} did not answer within {waiting.waited:.0f} s: {error}") from None
        assert wire is not None  # noqa: S101 - only the user's stop gives None, which cancels this task instead
        return wire

    async def _greet(self, dial: Callable[[], Awaitable[Wire]]) -> Wire:
        wire = await dial()
        try:
            await introduce(wire, self.token, self._hello())
            wire.give_up_after(ANSWER)
        except BaseException:
            wire.close()
            raise
        return wire

    def _hello(self) -> dict[str, object]:
        plan, nic = self.plan, self.facts.nic
        return {
            "run": run_of(plan),
            "rank": plan.nodes.rank,
            "address": plan.network.address,
            "host": host_id(),
            "life": self.life,
            "interface": plan.network.interface,
            "mtu": (nic.mtu or 0) if nic else 0,
            "speed": (speed_of(nic, self.facts.host) or 0) if nic else 0,
            "transport": plan.network.transport,
            "facts": told_facts(self._compared()),
            "findings": told_findings(self.findings),
            "ports": [{"port": port} for port in self._answering.ports],
            "key": self._answering.key,
            "tcp": self._meter.tcp,
            "udp": self._meter.udp,
            "meter_key": self._meter.key,
        }

    def _compared(self) -> Mapping[str, str]:
        # Names in NODES may stand for different addresses on different nodes.
        addresses = ",".join(self.plan.nodes.addresses) if all(self.plan.nodes.addresses) else ""
        return {**gather(self.plan), **({"addresses of NODES": addresses} if addresses else {})}

    async def _obey(self, wire: Wire) -> tuple[Row, ...]:
        rows: list[Row] = []
        while True:
            try:
                async with asyncio.timeout(SILENCE):
                    message = await wire.receive()
            except TimeoutError:
                raise NobodyError(f"node 0 was lost: no sign of life for {SILENCE:.0f} s") from None
            except (OSError, WireError) as error:
                raise NobodyError(f"node 0 was lost: {error}") from None
            kind = text(message, "kind")
            if kind == "refuse":
                raise NobodyError(text(message, "text", 2000))
            if kind == "news":
                self.say(text(message, "text", 4000))
            elif kind == "row":
                rank, address = integer(message, "rank", -1, 1 << 16), text(message, "address", 64)
                rows.append(Row(rank=rank, address=address, findings=read_findings(message)))
            elif kind == "end":
                return tuple(rows)
            elif kind != "beat":
                answer = await self._answer(kind, message)
                wire.send(f"{kind}-done", **answer)

    async def _answer(self, kind: str, message: Message) -> Mapping[str, object]:
        if kind == "clock":
            return {"micros": round(time.time() * 1e6)}
        if kind == "reach":
            return await self._reach(message)
        if kind == "speed":
            calibrate = bool(integer(message, "calibrate", 0, 1))
            return await asyncio.to_thread(self._speed, read_peer(message), calibrate=calibrate)
        if kind == "packets":
            mtu = integer(message, "mtu", 100, 1 << 20)
            outcome = await asyncio.to_thread(meter.full_size, self.plan.network.address, read_peer(message), mtu)
            return {"outcome": outcome}
        if kind == "leave":
            nonce = text(message, "nonce", 32)
            return {"wrote": int(await self._at_disk(lambda: self._leave(nonce), otherwise=False))}
        if kind == "look":
            nonce, upto = text(message, "nonce", 32), integer(message, "upto", 0, 1 << 16)
            seen = await self._at_disk(lambda: self._look(nonce, upto), otherwise=None)
            return {"looked": int(seen is not None), "seen": seen or []}
        if kind == "tidy":
            await self._at_disk(self._tidy, otherwise=None)
            return {}
        if kind == "all-reduce":
            return await self._reduce(message)
        raise NobodyError(f"node 0 asks {kind!r}, which this version of doctor does not know: use one image")

    async def _reach(self, message: Message) -> Mapping[str, object]:
        targets = [
            connectivity.Target(
                rank=integer(one, "rank", 0, 1 << 16),
                address=text(one, "address", 64),
                port=integer(one, "port", 1, 65535),
                key=text(one, "key", 64),
            )
            for one in items(message, "targets", 1 << 12)
        ]
        failed = await connectivity.dial_all(self.plan.network.address, targets)
        # torchrun's store, and the all-reduce below, need MASTER_PORT for themselves.
        return {"failed": [{"rank": target.rank, "port": target.port, "why": why} for target, why in failed]}

    def _speed(self, peer: meter.Peer, *, calibrate: bool) -> Mapping[str, object]:
        mine = meter.Peer(
            address=self.plan.network.address, tcp=self._meter.tcp, udp=self._meter.udp, key=self._meter.key
        )
        try:
            own = meter.measure(self.plan.network.address, mine) if calibrate else None
            found = meter.measure(self.plan.network.address, peer)
        except (OSError, ValueError) as error:
            return {"failure": connectivity.why(error) or type(error).__name__, "rtt": 0, "out": 0, "back": 0, "own": 0}
        rates = {"out": round(found.out), "back": round(found.back), "own": round(min(own.out, own.back)) if own else 0}
        return {"failure": "", "rtt": round(found.rtt * 1e9), **rates}

    async def _at_disk(self, work: Callable[[], Done], otherwise: Done) -> Done:
        """`otherwise` where the checkpoint folder cannot be read, or does not answer: `disk` and `shared` say so."""
        try:
            return await asyncio.to_thread(within, DISK_PATIENCE, work)
        except OSError:
            return otherwise

    def _nonce_file(self, nonce: str, rank: int) -> Path | None:
        """Where a node with this rank leaves its mark, if its checkpoint folder is this node's too."""
        disk = self.facts.look.disk
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
        self._answering.close()
        size = integer(message, "nnodes", 1, 1 << 16)
        place = integer(message, "place", 0, size - 1)
        try:
            found = await self.reduce(self.facts, self.plan, text(message, "run_id", 64), place, size)
        except OSError as error:
            found = Collective(failure=f"this node could not start it: {error.strerror or error}.")
        return told_collective(found)


async def meet(attendant: Attendant, wait: float) -> tuple[Row, ...]:
    """Takes part in the meeting, on node 0 also leads it; the table. Raises NobodyError, and OSError on node 0 where
    CONTROL_PORT is taken."""
    plan = attendant.plan
    if plan.nodes.rank:
        return await attendant.attend(_dial(plan), wait)
    meeting = Meeting(plan=plan, token=attendant.token, say=attendant.say, wait=wait)
    server = None
    if plan.nodes.count > 1:
        server = await listen(
            meeting.serve, plan.network.address, plan.network.control_port, backlog=2 * plan.nodes.count + 64
        )
    holding = asyncio.ensure_future(meeting.hold())
    own = asyncio.ensure_future(attendant.attend(_dial_inside(meeting), wait))
    try:
        await asyncio.wait([holding, own], return_when=asyncio.FIRST_EXCEPTION)
        if own.done() and own.exception() is not None and not holding.done():
            return own.result()
        return await holding
    except WireError as error:
        raise NobodyError(f"a node said what this version of doctor does not know ({error}): use one image") from None
    finally:
        for task in (holding, own):
            task.cancel()
        await asyncio.gather(holding, own, return_exceptions=True)
        if server:
            server.close()


def _dial(plan: Plan) -> Callable[[], Awaitable[Wire]]:
    async def dial() -> Wire:
        own = (plan.network.address, 0)
        return Wire(
            *await asyncio.open_connection(
                plan.nodes.addresses[0], plan.network.control_port, local_addr=own, limit=MAX_LINE
            )
        )

    return dial


def _dial_inside(meeting: Meeting) -> Callable[[], Awaitable[Wire]]:
    """Node 0 attends its own meeting over a pair of sockets that nobody else can reach."""
    tasks = set()

    async def dial() -> Wire:
        here, there = socket.socketpair()
        tasks.add(asyncio.ensure_future(meeting.serve(*await asyncio.open_connection(sock=there, limit=MAX_LINE))))
        return Wire(*await asyncio.open_connection(sock=here, limit=MAX_LINE))

    return dial


async def _rest(seconds: float) -> bool:
    """A stop cancels this node's task, so there is nothing else to wait for."""
    await asyncio.sleep(seconds)
    return False
