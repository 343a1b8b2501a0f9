"""Node 0's part of doctor: who is here, then one measurement after the other, then the table for all.

It is a session of the gang (`app.gang.session`), as a training is; every step is a question to the nodes.
"""

import asyncio
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence

from app.config.exitcodes import ExitCode
from app.doctor.cluster_checks import judge
from app.doctor.cluster_checks.links import slowness
from app.doctor.collect.meter import Speed
from app.doctor.findings import Row
from app.doctor.protocol import ALL_REDUCE, read_collective, read_meter, read_node, told_row
from app.doctor.results import Measured
from app.gang.connect import Waiting
from app.gang.connection import Message, integer, items, text
from app.gang.membership import NodeConnection
from app.gang.messages import Hello, Say
from app.gang.session import Session
from app.gang.verdict import Verdict
from app.plan import Plan

ANSWER = 25.0
"""Seconds for the answer to one question."""
SECOND_LOOKS = 2
LOOKS_SECONDS = 15.0
"""A busy moment of a machine passes, a slow link stays: a slow pair is measured again, the best counts. Where all are
slow there is no time for all, and no need."""
MOST_STEPS = 15
"""Up to 16 nodes every pair is measured; above, each node with 15 others."""
CLOCK_ASKS = 5


class DoctorCoordinator(Session):
    """The session of one run of doctor."""

    job = "doctor"

    def __init__(self, plan: Plan, token: bytes, say: Say) -> None:
        super().__init__(plan, token, say)
        self.measured = Measured(listed=plan.nodes.addresses)
        self._meters: dict[int, Mapping[str, str | int]] = {}
        self._open = True

    def objection(self, hello: Hello) -> str:
        if not self._open:
            return "doctor has begun without this node: start it again on all nodes"
        if twin := self.membership.twin(hello):
            first, second = (f"{self.membership.address(one)} (host {one.host})" for one in (twin, hello))
            fix = "Remove NODE_RANK where it was set by hand, or set it right."
            sentence = f"Two nodes say they are node {hello.rank}: {first} and {second}. {fix}"
            self.measured.doubles.append(sentence)
            return sentence
        return ""

    def lose(self, node: NodeConnection, why: str, *, silent: bool = False) -> None:
        if not self._open and self.membership.holds(node):
            self.measured.lost[node.hello.rank] = why
        super().lose(node, why, silent=silent)

    async def run(self) -> tuple[Row, ...]:
        """Leads the session to its end; returns the table that every node was told."""
        presence = asyncio.create_task(self.keep_presence())
        try:
            await self.roll_call(Waiting(self.plan.timeouts.start, self.tell), self._in_vain)
            self._open = False
            reasons = self.membership.absent
            self.measured.missing = {
                rank: reasons.get(rank, "nothing heard from it") for rank in self.membership.missing()
            }
            await self._introduce()
            if len(self.membership) > 1:
                self.tell(f"{len(self.membership)} nodes connected; measuring every pair")
                await self._reach()
                await self._pairs()
                await self._clocks()
                await self._shared()
            await self._all_reduce()
            rows = judge(self.measured)
            for row in rows:
                await self._ask_all(self._ranks(), "row", **told_row(row))
        finally:
            presence.cancel()
        await self.finish(Verdict(code=ExitCode.DONE, text="doctor is done"))
        return rows

    def _in_vain(self) -> bool:
        """Whether everybody has come or was turned away."""
        return bool(self.measured.doubles) or {*self.membership.missing()} <= self.membership.rejected.keys()

    def _ranks(self) -> list[int]:
        return list(self.membership.all())

    async def _ask_all(self, ranks: Iterable[int], question: str, **fields: object) -> dict[int, Message]:
        """The same question to several nodes at once: the answers of those that are not lost."""
        asked = list(ranks)
        answers = await asyncio.gather(*(self.ask(rank, question, fields, ANSWER) for rank in asked))
        return {rank: answer for rank, answer in zip(asked, answers, strict=True) if answer is not None}

    async def _introduce(self) -> None:
        """What each node has found by itself."""
        hellos = {rank: node.hello for rank, node in self.membership.all().items()}
        answers = await self._ask_all(hellos, "results")
        for rank, hello in hellos.items():
            answer = answers.get(rank)
            address = self.membership.address(hello)
            self.measured.nodes[rank] = read_node(answer, hello, address)
            if answer is not None:
                self._meters[rank] = read_meter(answer, address)

    async def _reach(self) -> None:
        """Every node connects to its share of the others, on random ports and on MASTER_PORT."""
        state = await self.connectivity()
        for rank in state.ranks:
            self.measured.tried |= {(rank, peer) for peer in state.peers(rank)}
        for pair in state.blocked:
            self.measured.blocked[pair.source, pair.target, pair.why] = [*pair.ports]
        for rank in state.pending:
            if node := self.membership.get(rank):
                self.lose(node, "it did not say whom it reaches")

    async def _pairs(self) -> None:
        """Speed of every pair and full-size packets both ways; a node is in one pair at a time."""
        for step in steps(self._ranks())[:MOST_STEPS]:
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
            if source in self.membership and target in self.membership and (source, target) not in cut:
                mtu = min(self.measured.nodes[source].mtu, self.measured.nodes[target].mtu)
                answer = (
                    await self.ask(source, "packets", {"mtu": mtu, **self._meters[target]}, ANSWER) if mtu else None
                )
                if answer is not None:
                    self.measured.packets[source, target] = text(answer, "outcome", 20)

    async def _speed(self, first: int, second: int, *, calibrate: bool = False) -> None:
        if first not in self.membership or second not in self.membership:
            return
        answer = await self.ask(first, "speed", {"calibrate": int(calibrate), **self._meters[second]}, ANSWER)
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
        for rank in self._ranks():
            best: tuple[float, float] | None = None
            for _ in range(CLOCK_ASKS if rank else 0):
                before = time.time()
                answer = await self.ask(rank, "clock", {}, ANSWER)
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
        left = await self._ask_all(self._ranks(), "leave", nonce=nonce)
        wrote = sorted(rank for rank, answer in left.items() if integer(answer, "wrote", 0, 1))
        looked = await self._ask_all(wrote, "look", nonce=nonce, upto=max(wrote, default=0))
        for rank, answer in looked.items():
            if integer(answer, "looked", 0, 1):
                seen = frozenset(integer(one, "rank", 0, 1 << 20) for one in items(answer, "seen", 1 << 14))
                self.measured.seen[rank] = seen & set(wrote) | {rank}
        await self._ask_all(self._ranks(), "tidy")

    async def _all_reduce(self) -> None:
        """A short real collective through torchrun, only where all nodes are here and reach each other."""
        if self.measured.hopeless:
            self.measured.no_collective = "not tried: first fix what is red"
            return
        self.tell("all-reduce through torchrun")
        ranks, run_id = self._ranks(), f"doctor-{secrets.token_hex(4)}"
        common = {"run_id": run_id, "nnodes": len(ranks)}
        work = [
            self.ask(rank, "all-reduce", {"place": place, **common}, ALL_REDUCE + ANSWER)
            for place, rank in enumerate(ranks)
        ]
        for rank, answer in zip(ranks, await asyncio.gather(*work), strict=True):
            if answer is not None:
                self.measured.collectives[rank] = read_collective(answer)


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
