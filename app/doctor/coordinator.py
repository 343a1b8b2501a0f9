"""Node 0's part of doctor: who is here, then one measurement after the other, then the table for all.

It is a session of the gang (`app.gang.session`), as a training is; every step is a question to the nodes.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable

from app.config.exitcodes import ExitCode
from app.doctor.cluster_checks import judge
from app.doctor.collect.packets import Peer
from app.doctor.findings import Row
from app.doctor.protocol import (
    COLLECTIVE,
    peer_fields,
    read_findings,
    read_node,
    read_outcomes,
    read_peer,
    read_seen,
    row_fields,
)
from app.doctor.results import Measured, NodeResults
from app.gang.connect import Waiting
from app.gang.connection import Message, integer
from app.gang.membership import NodeConnection
from app.gang.messages import Hello, Say
from app.gang.session import Answer, Session
from app.gang.verdict import Verdict
from app.plan import Plan

ANSWER = 25.0
"""Seconds for the answer to one question."""
CLOCK_ASKS = 5


class DoctorCoordinator(Session):
    """The session of one run of doctor."""

    job = "doctor"

    def __init__(self, plan: Plan, token: bytes, say: Say) -> None:
        super().__init__(plan, token, say)
        self.measured = Measured(listed=plan.nodes.addresses)
        self._echoes: dict[int, Peer] = {}
        """Where the nodes echo packets."""
        self._shares: dict[int, list[int]] = {}
        """For each node, the others that it tries."""
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
        """Leads the session to its end; returns the table that every node was sent."""
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
                self.tell(f"{len(self.membership)} nodes connected; trying every pair")
                await self._reach()
                await self._packets()
                await self._clocks()
                await self._shared()
            await self._all_reduce()
            rows = judge(self.measured)
            for row in rows:
                await self._ask_all(dict, self._ranks(), "row", **row_fields(row))
        finally:
            presence.cancel()
        await self.finish(Verdict(code=ExitCode.DONE, text="doctor is done"))
        return rows

    def _in_vain(self) -> bool:
        """Whether everybody has come or was turned away."""
        return bool(self.measured.doubles) or {*self.membership.missing()} <= self.membership.rejected.keys()

    def _ranks(self) -> list[int]:
        return list(self.membership.all())

    async def _ask_all(
        self, read: Callable[[Message], Answer], ranks: Iterable[int], question: str, **fields: object
    ) -> dict[int, Answer]:
        """The same question to several nodes at once: what is read of the answers of those that are not lost."""
        asked = list(ranks)
        answers = await asyncio.gather(*(self.ask_for(read, rank, question, fields, ANSWER) for rank in asked))
        return {rank: answer for rank, answer in zip(asked, answers, strict=True) if answer is not None}

    async def _introduce(self) -> None:
        """What each node has found by itself."""
        hellos = {rank: node.hello for rank, node in self.membership.all().items()}

        async def introduce(rank: int, hello: Hello) -> None:
            address = self.membership.address(hello)

            def read(answer: Message) -> tuple[NodeResults, Peer]:
                return read_node(answer, hello, address), read_peer(answer, address)

            if found := await self.ask_for(read, rank, "results", {}, ANSWER):
                self.measured.nodes[rank], self._echoes[rank] = found
            else:
                self.measured.nodes[rank] = read_node(None, hello, address)

        await asyncio.gather(*(introduce(rank, hello) for rank, hello in hellos.items()))

    async def _reach(self) -> None:
        """Every node connects to its share of the others, on random ports and on MASTER_PORT."""
        state = await self.connectivity()
        self._shares = {rank: state.peers(rank) for rank in state.ranks}
        self.measured.tried = {(rank, peer) for rank, peers in self._shares.items() for peer in peers}
        for pair in state.blocked:
            self.measured.blocked[pair.source, pair.target, pair.why] = [*pair.ports]
        for rank in state.pending:
            if node := self.membership.get(rank):
                self.lose(node, "it did not say whom it reaches")

    async def _packets(self) -> None:
        """Every node sends packets of full size to its share of the others."""
        cut = {(source, target) for source, target, _ in self.measured.blocked}
        asked, work = self._ranks(), []
        for rank in asked:
            mtus = {peer: min(self.measured.nodes[one].mtu for one in (rank, peer)) for peer in self._shares[rank]}
            peers = [
                {**peer_fields(peer, self._echoes[peer]), "mtu": mtu}
                for peer, mtu in mtus.items()
                if mtu and peer in self.membership and (rank, peer) not in cut
            ]
            work.append(self.ask_for(read_outcomes, rank, "packets", {"peers": peers}, ANSWER))
        for rank, outcomes in zip(asked, await asyncio.gather(*work), strict=True):
            for peer, outcome in outcomes or ():
                if peer in self.measured.nodes:
                    self.measured.packets[rank, peer] = outcome

    async def _clocks(self) -> None:
        for rank in self._ranks():
            best: tuple[float, float] | None = None
            for _ in range(CLOCK_ASKS if rank else 0):
                before = time.time()
                micros = await self.ask_for(
                    lambda answer: integer(answer, "micros", 0, 1 << 60), rank, "clock", {}, ANSWER
                )
                after = time.time()
                if micros is None:
                    break
                offset = micros / 1e6 - (before + after) / 2
                doubt = (after - before) / 2
                if best is None or doubt < best[1]:
                    best = (offset, doubt)
            if best is not None:
                self.measured.offsets[rank] = best

    async def _shared(self) -> None:
        """Each node leaves a file in its checkpoint folder, then all look whose they see."""
        nonce = secrets.token_hex(8)
        left = await self._ask_all(lambda answer: integer(answer, "wrote", 0, 1), self._ranks(), "leave", nonce=nonce)
        wrote = sorted(rank for rank, done in left.items() if done)
        looked = await self._ask_all(read_seen, wrote, "look", nonce=nonce, upto=max(wrote, default=0))
        for rank, (done, seen) in looked.items():
            if done:
                self.measured.seen[rank] = seen & set(wrote) | {rank}
        await self._ask_all(dict, self._ranks(), "tidy")

    async def _all_reduce(self) -> None:
        """A short real collective through torchrun, only where all nodes are here and reach each other."""
        if self.measured.collective_would_hang:
            self.measured.no_collective = "not tried: first fix what is red"
            return
        self.tell("torchrun: speed of the pairs, then an all-reduce")
        ranks, run_id = self._ranks(), f"doctor-{secrets.token_hex(4)}"
        common = {"run_id": run_id, "nnodes": len(ranks)}
        work = [
            self.ask_for(read_findings, rank, "all-reduce", {"place": place, **common}, COLLECTIVE + ANSWER)
            for place, rank in enumerate(ranks)
        ]
        for rank, findings in zip(ranks, await asyncio.gather(*work), strict=True):
            if findings is not None:
                self.measured.collectives[rank] = findings
