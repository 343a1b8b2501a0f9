"""Node 0's part of the meeting: who is here, then one measurement after the other, then the table for all.

Every step is a question to the nodes and their answers, over the gang's own wire (`app.gang.connection`).
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field

from app.doctor.cluster_checks import judge
from app.doctor.cluster_checks.links import slowness
from app.doctor.collect.meter import Speed
from app.doctor.findings import Row
from app.doctor.results import Measured
from app.doctor.talk import Seat, read_collective, read_seat, told_findings
from app.gang import connectivity
from app.gang.connection import HANDSHAKE, Message, UntrustedError, Wire, WireError, challenge, integer, items, text
from app.gang.messages import Say
from app.plan import Plan

BEAT = 2.0
SAY_AFTER, SAY_EVERY = 2.0, 10.0
STRAGGLERS = 2.0
"""Seconds that are waited once every node has come or was turned away."""
ANSWER = 25.0
"""Seconds for the answer to one question."""
ALL_REDUCE = 45.0
"""Seconds from the start of torchrun, most of which is the import of torch, to its end."""
SECOND_LOOKS = 2
LOOKS_SECONDS = 15.0
"""A busy moment of a machine passes, a slow link stays: a slow pair is measured again, the best counts. Where all are
slow there is no time for all, and no need."""
MOST_STEPS = 15
"""Up to 16 nodes every pair is measured; above, each node with 15 others."""
CLOCK_ASKS = 5


def run_of(plan: Plan) -> str:
    """Names the doctor's talk on CONTROL_PORT; no RUN_NAME has a space."""
    return f"doctor of {plan.run_name}"


@dataclass(slots=True, kw_only=True)
class Meeting:
    """One run of doctor as node 0 sees it."""

    plan: Plan
    token: bytes
    say: Say
    wait: float
    """Seconds that the nodes have to come."""
    seats: dict[int, Seat] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    _turned_away: dict[str, str] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _open: bool = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: gives the node its seat and hears it, or turns it away."""
        wire, seat = Wire(reader, writer), None
        try:
            async with asyncio.timeout(HANDSHAKE):
                message = await challenge(wire, self.token)
            seat = self._seat(wire, message)
            self._news.set()
            while True:
                seat.inbox.put_nowait(await wire.receive())
        except UntrustedError as error:
            self._turned_away[wire.peer] = f"{error}: its CLUSTER_TOKEN_FILE is not that of node 0"
        except (WireError, OSError, TimeoutError) as error:
            if seat is not None:
                self._leave(seat, str(error))
        except asyncio.CancelledError:
            pass  # the loop ends; Python 3.11's asyncio.streams would print a traceback of its own
        finally:
            wire.close()
            self._news.set()

    def _leave(self, seat: Seat, why: str) -> None:
        """Whoever goes before all have come may come again: its doctor was stopped and started anew."""
        seat.inbox.put_nowait(why)
        if self._open and self.seats.get(seat.node.rank) is seat:
            del self.seats[seat.node.rank]

    def _seat(self, wire: Wire, message: Message) -> Seat:
        run = text(message, "run", 200)
        if run != run_of(self.plan):
            if run.startswith("doctor of "):
                self._turned_away[wire.peer] = f"it runs {run!r}, this is {run_of(self.plan)!r}: RUN_NAME differs"
                wire.send("refuse", text=f"node 0 has another RUN_NAME, {self.plan.run_name!r}")
            # A node that waits to train is not answered: it keeps trying, and comes to its job once doctor is done.
            raise WireError("not doctor")
        seat = read_seat(wire, message)
        rank, taken = seat.node.rank, self.seats.get(seat.node.rank)
        if not self._open:
            wire.send("refuse", text="doctor has begun without this node: start it again on all nodes")
            raise WireError("too late")
        if taken and taken.life != seat.life:
            first, second = (f"{one.node.address} (host {one.node.host})" for one in (taken, seat))
            sentence = (
                f"Two nodes say they are node {rank}: {first} and {second}. Remove NODE_RANK where it was set by hand, "
                "or set it right."
            )
            self.measured.doubles.append(sentence)
            wire.send("refuse", text=sentence)
            raise WireError("rank taken")
        wire.give_up_after(ANSWER)
        self.seats[rank] = seat
        return seat

    async def hold(self) -> tuple[Row, ...]:
        """Leads the meeting to its end; returns the table that every node was told."""
        beats = asyncio.create_task(self._beat())
        try:
            await self._gather()
            measured = self.measured
            measured.listed = self.plan.nodes.addresses
            measured.nodes = {rank: seat.node for rank, seat in sorted(self.seats.items())}
            if len(self.seats) > 1:
                await self._tell(f"{len(self.seats)} nodes are here; measuring every pair")
                await self._reach()
                await self._pairs()
                await self._clocks()
                await self._shared()
            await self._all_reduce()
            rows = judge(measured)
            for seat in self.seats.values():
                for row in rows:
                    seat.wire.send("row", rank=row.rank, address=row.address, findings=told_findings(row.findings))
                seat.wire.send("end")
            return rows
        finally:
            beats.cancel()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            for seat in self.seats.values():
                seat.wire.send("beat")

    async def _tell(self, what: str) -> None:
        for seat in self.seats.values():
            seat.wire.send("news", text=what)

    async def _gather(self) -> None:
        """Waits until all nodes are here, or were turned away, or the time is up."""
        start = time.monotonic()
        until, said = start + self.wait, start + SAY_AFTER - SAY_EVERY
        reasons: dict[int, str] = {}
        while missing := [rank for rank in range(self.plan.nodes.count) if rank not in self.seats]:
            if all(self.plan.nodes.addresses[rank] in self._turned_away for rank in missing) or self.measured.doubles:
                until = min(until, time.monotonic() + STRAGGLERS)
            now = time.monotonic()
            if now >= until:
                break
            if now - said >= SAY_EVERY:
                said = now
                reasons = await self._reasons(missing)
                names = "; ".join(f"{self._name(rank)}: {reasons[rank]}" for rank in missing[:8])
                await self._tell(f"waiting for {names} ({until - time.monotonic():.0f} s more)")
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.05, min(1.0, until - time.monotonic()))):
                    await self._news.wait()
        self._open = False
        reasons = await self._reasons(missing) if missing else {}
        self.measured.missing = reasons

    def _name(self, rank: int) -> str:
        address = self.plan.nodes.addresses[rank]
        return f"node {rank} ({address})" if address else f"node {rank}"

    async def _reasons(self, missing: Sequence[int]) -> dict[int, str]:
        found = await asyncio.gather(*(self._reason(self.plan.nodes.addresses[rank]) for rank in missing))
        return dict(zip(missing, found, strict=True))

    async def _reason(self, address: str) -> str:
        if address in self._turned_away:
            return self._turned_away[address]
        if not address:
            return "its address is unknown without NODES"
        try:
            async with asyncio.timeout(connectivity.CONNECT):
                _, writer = await asyncio.open_connection(address, self.plan.network.control_port)
        except (OSError, TimeoutError) as error:
            alive = " (the machine is up; doctor is not started there, or it cannot reach node 0)"
            return connectivity.why(error) + alive * isinstance(error, ConnectionRefusedError)
        writer.close()
        return "something else listens on its CONTROL_PORT"

    async def _ask(self, rank: int, kind: str, fields: Mapping[str, object], seconds: float = ANSWER) -> Message | None:
        """One node's answer; None if it is lost, which is noted."""
        seat = self.seats.get(rank)
        if seat is None:
            return None
        try:
            async with asyncio.timeout(seconds):
                seat.wire.send(kind, **fields)
                answer = await seat.inbox.get()
            if not isinstance(answer, str) and answer["kind"] == f"{kind}-done":
                return answer
            why = answer if isinstance(answer, str) else f"it answered {text(answer, 'kind')!r} to {kind!r}"
        except TimeoutError:
            why = f"no answer within {seconds:.0f} s"
        self.measured.lost[rank] = why
        seat.wire.close()
        del self.seats[rank]
        return None

    async def _ask_all(self, questions: Mapping[int, Awaitable[Message | None]]) -> dict[int, Message]:
        answers = await asyncio.gather(*questions.values())
        return {rank: answer for rank, answer in zip(questions, answers, strict=True) if answer is not None}

    async def _reach(self) -> None:
        """Every node connects to its share of the others, on random ports and on MASTER_PORT."""
        ranks = sorted(self.seats)
        questions = {}
        for index, rank in enumerate(ranks):
            peers = [ranks[other] for other in connectivity.targets(index, len(ranks))]
            self.measured.tried |= {(rank, peer) for peer in peers}
            targets = [
                {"rank": peer, "address": seat.node.address, "port": port, "key": seat.key}
                for peer in peers
                for seat in [self.seats[peer]]
                for port in seat.ports
            ]
            questions[rank] = self._ask(rank, "reach", {"targets": targets})
        for rank, answer in (await self._ask_all(questions)).items():
            with contextlib.suppress(WireError):
                for failed in items(answer, "failed", 4 * len(ranks)):
                    peer = integer(failed, "rank", 0, 1 << 20)
                    if peer in self.measured.nodes:
                        key = (rank, peer, text(failed, "why", 200))
                        self.measured.blocked.setdefault(key, []).append(integer(failed, "port", 1, 65535))

    async def _pairs(self) -> None:
        """Speed of every pair and full-size packets both ways; a node is in one pair at a time."""
        for step in steps(sorted(self.seats))[:MOST_STEPS]:
            await asyncio.gather(*(self._pair(*pair) for pair in step))
        until = time.monotonic() + LOOKS_SECONDS
        for _ in range(SECOND_LOOKS):
            for pair, speed in list(self.measured.speeds.items()):
                if slowness(self.measured, pair, speed) and time.monotonic() < until:
                    await self._speed(*pair, calibrate=True)

    async def _pair(self, first: int, second: int) -> None:
        cut = {(source, target) for source, target, _ in self.measured.blocked}
        if (first, second) in cut:
            self.measured.unmeasured[first, second] = "it cannot be reached"
            return
        await self._speed(first, second)
        for source, target in ((first, second), (second, first)):
            if source in self.seats and target in self.seats and (source, target) not in cut:
                mtu = min(self.measured.nodes[source].mtu, self.measured.nodes[target].mtu)
                answer = await self._ask(source, "packets", {"mtu": mtu, **self.seats[target].meter}) if mtu else None
                if answer is not None:
                    self.measured.packets[source, target] = text(answer, "outcome", 20)

    async def _speed(self, first: int, second: int, *, calibrate: bool = False) -> None:
        if first not in self.seats or second not in self.seats:
            return
        answer = await self._ask(first, "speed", {"calibrate": int(calibrate), **self.seats[second].meter})
        if answer is None:
            return
        if why := text(answer, "failure", 200):
            self.measured.unmeasured[first, second] = why
            return
        rtt, out, back, own = (integer(answer, name, 0, 1 << 50) for name in ("rtt", "out", "back", "own"))
        before = self.measured.speeds.get((first, second), Speed(rtt=rtt / 1e9, out=0, back=0))
        self.measured.speeds[first, second] = Speed(
            rtt=min(before.rtt, rtt / 1e9),
            out=max(before.out, out),
            back=max(before.back, back),
            own=min(own, before.own or own) if own else before.own,
        )

    async def _clocks(self) -> None:
        for rank in sorted(self.seats.keys() - {0}):
            best: tuple[float, float] | None = None
            for _ in range(CLOCK_ASKS):
                before = time.time()
                answer = await self._ask(rank, "clock", {})
                after = time.time()
                if answer is None:
                    break
                offset = integer(answer, "micros", 0, 1 << 60) / 1e6 - (before + after) / 2
                doubt = (after - before) / 2
                if best is None or doubt < best[1]:
                    best = (offset, doubt)
            if best is not None:
                self.measured.offsets[rank] = best

    async def _shared(self) -> None:
        """Each node leaves a file in its checkpoint folder, then all look whose they see."""
        nonce = secrets.token_hex(8)
        left = await self._ask_all({rank: self._ask(rank, "leave", {"nonce": nonce}) for rank in sorted(self.seats)})
        wrote = sorted(rank for rank, answer in left.items() if integer(answer, "wrote", 0, 1))
        looked = await self._ask_all(
            {rank: self._ask(rank, "look", {"nonce": nonce, "upto": max(wrote)}) for rank in wrote}
        )
        for rank, answer in looked.items():
            if not integer(answer, "looked", 0, 1):
                continue
            seen = frozenset(integer(one, "rank", 0, 1 << 20) for one in items(answer, "seen", 1 << 14))
            self.measured.seen[rank] = seen & set(wrote) | {rank}
        await self._ask_all({rank: self._ask(rank, "tidy", {}) for rank in sorted(self.seats)})

    async def _all_reduce(self) -> None:
        """A short real collective through torchrun, only where all nodes are here and reach each other."""
        measured = self.measured
        if measured.hopeless:
            measured.no_collective = "not tried: first cure what is red"
            return
        await self._tell("all-reduce through torchrun")
        ranks = sorted(self.seats)
        run_id = f"doctor-{secrets.token_hex(4)}"
        questions = {
            rank: self._ask(
                rank, "all-reduce", {"run_id": run_id, "place": index, "nnodes": len(ranks)}, ALL_REDUCE + ANSWER
            )
            for index, rank in enumerate(ranks)
        }
        for rank, answer in (await self._ask_all(questions)).items():
            measured.collectives[rank] = read_collective(answer)


def steps(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair of `ranks` once, in steps in which each node is in at most one pair (the circle method)."""
    circle: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(one, two), max(one, two)) for one, two in pairs if one is not None and two is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found
