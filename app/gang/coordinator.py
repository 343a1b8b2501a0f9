"""Node 0's part of a training: are all here, do they agree, can they reach each other, and what ends a round.

One coroutine, `Coordinator.run`, decides; each connection hands on what its node says (`session.py`).
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from app.config.exitcodes import ExitCode
from app.gang import probes
from app.gang.connect import Waiting
from app.gang.connection import Connection, text
from app.gang.connectivity import Blocked
from app.gang.membership import NodeConnection
from app.gang.messages import LAST_ROUND, Hello, Say
from app.gang.mirror.step import copy_in_background, copy_last, share_checkpoints
from app.gang.places import assign
from app.gang.round import RoundState
from app.gang.session import LAST_WORD, Session
from app.gang.verdict import JobEnded, NodeFailure, Verdict, first_causes, summarize, suspect_self
from app.plan import Plan

__all__ = ["LAST_WORD", "LINGER", "Coordinator"]

LONGEST_PAUSE = 30.0
"""Seconds before a round; the first restart comes at once, each further one in a row after twice the pause."""
LINGER = 10.0
"""Seconds that a job which was refused still tells those who come late: they would wait until START_TIMEOUT."""
POLL = 0.05
"""Seconds between two looks whether the checkpoints are level."""
PROGRESS = 30.0
SPARE = 10.0
"""Seconds that a start waits for the rest once there are enough nodes to train: the rest are spares then."""
GROWTH = 2.0
"""Seconds between two looks for a new checkpoint, while a node waits to join a round with too few."""
NAMED = 8
"""Pairs that cannot reach each other: a firewall on a large cluster makes hundreds."""


class Coordinator(Session):
    """The session of a training."""

    def __init__(self, plan: Plan, token: bytes, say: Say, link: Callable[[], str] = lambda: "") -> None:
        """`link` tells that this node's own link is down, "" where it is not."""
        super().__init__(plan, token, say)
        self._link = link
        self._signature = ("", "")
        """Of the last round's first cause, as long as there is no progress."""
        self.round = 0
        self.failures = 0
        self._running = False
        self._owners = [*range(plan.nodes.training)]
        """Of each place in a round, as in `places.assign`."""
        self._places: Mapping[int, NodeConnection] = {}
        """The nodes of the last round, in their order."""
        self._given_up = set[int]()
        """Nodes that were missing when the last round began: nobody waits for them again."""
        self._enough_since = 0.0
        self._handover = 0.0
        """Seconds from the end of a round to the start of the next; 0 while unknown."""
        self._cause = ""
        self._proven: Mapping[int, NodeConnection] = {}
        """The nodes that reached each other when that was tried last."""
        self._has_progressed = False
        """The training made progress in some round, so its script and arguments are good."""
        self._ending_since = 0.0
        """Monotonic time at which the last round was told to end, or ended by itself."""

    def objection(self, hello: Hello) -> str:
        """Two nodes that claim one rank at the start end the job."""
        if twin := self.membership.twin(hello):
            first, second = (f"{self.membership.address(one)} (host {one.host})" for one in (twin, hello))
            fix = "Remove NODE_RANK where it was set by hand, or set it right."
            told = f"two nodes say they are node {hello.rank}: {first} and {second}. {fix}"
            if not self.round:
                self.conclude(Verdict(code=ExitCode.DISAGREE, text=told))
            return told
        if self.round and (wrong := self.membership.disagreement(hello)):
            return f"node {hello.rank} no longer agrees with the others:\n{wrong}"
        return ""

    def welcome(self, connection: Connection) -> None:
        if self._running:
            self._let_wait(connection)

    def _let_wait(self, connection: Connection) -> None:
        """Tells a node that it has no place in the running round."""
        full = len(self._places) == self.plan.nodes.training
        then = "it is a spare" if full else "it joins the next one" + (self._handed_over() if self._grows else "")
        connection.send("wait", text=f"round {self.round} runs without this node; {then}", round=self.round)

    async def run(self) -> Verdict:
        """Leads the job to its end; returns the verdict that every node was told."""
        presence = asyncio.create_task(self.keep_presence())
        try:
            while True:
                nodes = await self._assemble()
                failures = await self._verify_connectivity() or await self._share_checkpoints()
                ended = failures or await self._run_round(nodes)
                if ended:
                    await self._restart_or_fail(ended)
        except JobEnded as end:
            verdict = end.verdict
            await self._copy_last(verdict)
        finally:
            presence.cancel()
        refused = not self.round and verdict.code in (ExitCode.DISAGREE, ExitCode.SETTINGS)
        await self.finish(verdict, LINGER if refused else 0.0)
        return verdict

    async def _assemble(self) -> Mapping[int, NodeConnection]:
        """The nodes of the next round, once they are here and agree; raises JobEnded when they never will."""
        timeout = self.plan.timeouts.rejoin if self.round else self.plan.timeouts.start
        waiting = Waiting(timeout, self.tell)
        self._enough_since = 0.0
        await self.roll_call(waiting, self.membership.disagrees, self._has_enough)
        wrong, doubtful = self.membership.differences()
        if wrong:
            raise JobEnded(ExitCode.DISAGREE, f"the nodes do not agree; nothing was started:\n{wrong}")
        missing = self.membership.missing()
        if len(self.membership) < self.plan.nodes.training or 0 not in self.membership:
            self._without(missing, timeout)
        self._given_up = {*missing}
        if doubtful and self.round == 0:
            self.tell(f"warning: the nodes differ, which may be intended:\n{doubtful}")
        nodes = self._take_places()
        if self.round == 0:
            # A node 0 that was started again goes on where the others were.
            self.round = max(node.hello.round for node in nodes.values())
            self.failures = max(node.hello.failures for node in nodes.values())
        self.round += 1
        return nodes

    def _has_enough(self) -> bool:
        """Whether to go on without those that are missing: spares, or those that were missed the last time as well."""
        missing, here = {*self.membership.missing()}, len(self.membership)
        if 0 in missing:
            return False
        if self.round:
            return here >= self.plan.nodes.training or (missing <= self._given_up and here >= self.plan.nodes.minimum)
        if here < self.plan.nodes.training or not self.plan.nodes.spares:
            self._enough_since = 0.0
            return False
        self._enough_since = self._enough_since or time.monotonic()
        return time.monotonic() - self._enough_since > SPARE

    def _take_places(self) -> dict[int, NodeConnection]:
        """The nodes of the next round in their places."""
        here = self.membership.all()
        before, self._owners = self._owners, assign(self._owners, here)
        for old, new in zip(before, self._owners, strict=True):
            if old != new:
                self.tell(f"{self.membership.name(new)} takes the place of {self.membership.name(old)}")
        return {rank: here[rank] for rank in self._owners if rank in here}

    def _without(self, missing: Sequence[int], timeout: float) -> None:
        if len(self.membership) >= self.plan.nodes.minimum and 0 in self.membership:
            minimum = f"MIN_NODES={self.plan.nodes.minimum}"
            self.tell(f"going on without {self.membership.reasons(missing)} ({minimum})")
            return
        name = "REJOIN_TIMEOUT" if self.round else "START_TIMEOUT"
        told = f"timed out after {timeout:.0f} s ({name}) waiting for {self.membership.reasons(missing)}"
        if self.round:
            raise JobEnded(ExitCode.LOST, f"{self._cause}; {told}" if self._cause else told)
        here = f"{self.plan.nodes.addresses[0]}:{self.plan.network.control_port}"
        fix = f"Start torchrun-compose there; if it runs there, allow it to reach {here}."
        raise JobEnded(ExitCode.UNREACHABLE, f"{told}. Fix: {fix}")

    async def _verify_connectivity(self) -> list[NodeFailure]:
        """Returns the failures of nodes lost meanwhile, and before a later round of pairs that do not connect."""
        # A second failure in a row may be the network's.
        proven = self._proven if self.failures == 1 else {}
        self._proven, state = {}, await self.connectivity(proven)
        failures = [
            NodeFailure(
                node=self.membership.name(rank), what=f"was lost: {why}", seen=seen, code=ExitCode.LOST, abrupt=True
            )
            for rank, (why, seen) in state.lost.items()
        ]
        failures += [
            NodeFailure(
                node=self.membership.name(rank), what="was lost: no answer", seen=state.limit, code=ExitCode.LOST
            )
            for rank in sorted(state.pending)
        ]
        if blocked := state.blocked:
            pairs = [self._blocked(pair) for pair in blocked[:NAMED]]
            more = [f"  and {len(blocked) - NAMED} more"] if len(blocked) > NAMED else []
            told = "\n".join(["nodes cannot reach each other:", *pairs, *more])
            if self.round == 1:
                raise JobEnded(ExitCode.UNREACHABLE, told)
            # It worked before: a link that is not quite back gets another round.
            pair = NodeFailure(node="the gang:", what=told, seen=time.monotonic(), code=ExitCode.UNREACHABLE)
            return [pair, *failures]
        if not failures:
            self._proven = {rank: node for rank, node in self.membership.all().items() if rank in state.here}
        if self.round == 1 and not failures and len(state.ranks) > 1:
            here = f"all {len(state.ranks)} nodes connected"
            self.tell(f"{here}; configuration matches; every node reaches its peers")
        return failures

    async def _share_checkpoints(self) -> list[NodeFailure]:
        """Every node gets the checkpoints that it lacks. Returns the failures of nodes lost meanwhile."""
        sharing, until = asyncio.ensure_future(self._share()), math.inf
        failures = list[NodeFailure]()
        try:
            while not failures and (not sharing.done() or time.monotonic() < until):
                event = await self.rest(time.monotonic() + POLL)
                if event and event.kind == "lost":
                    what = f"was lost: {event.why}"
                    node = self.membership.name(event.rank)
                    failures.append(NodeFailure(node=node, what=what, seen=time.monotonic(), code=ExitCode.LOST))
                if sharing.done() and until == math.inf:
                    # Whoever asked a lost node may know before the event is read.
                    until = time.monotonic() + (LAST_WORD if sharing.result() else 0.0)
        finally:
            sharing.cancel()
            await asyncio.wait([sharing], timeout=LAST_WORD)
        return failures

    async def _share(self) -> bool:
        """Whether a node was lost meanwhile."""
        if len(self.membership) < 2:
            return False
        try:
            changed = await share_checkpoints(self.plan, self.membership, self.ask, self.tell)
        except ConnectionResetError:
            return True
        except Exception as error:  # Whatever it is: the job may train without it.
            self.tell(f"warning: checkpoints were not compared: {type(error).__name__}: {error}")
            return False
        # What came from elsewhere is no progress of the round that follows.
        for rank, node in self.membership.all().items():
            waited = self._places and rank not in self._places
            if (changed or waited) and (reply := await self.ask(rank, "progress", {}, PROGRESS)):
                node.hello = replace(node.hello, progress=text(reply, "progress", 200))
        return False

    def _blocked(self, pair: Blocked) -> str:
        nodes = self.membership.all()
        source, target = (self.membership.address(nodes[rank].hello) for rank in (pair.source, pair.target))
        master = self.plan.network.master_port
        ports = " and ".join(f"{port} (MASTER_PORT)" if port == master else str(port) for port in pair.ports)
        names = f"{self.membership.name(pair.source)} to {self.membership.name(pair.target)}"
        told = f"  {names}, port {ports}: {pair.why}"
        if pair.connects:
            return told
        several = len(pair.ports) > 1
        fix = "NCCL and Gloo use random ports, so open all ports between the nodes" if several else "Open it"
        return f"{told}. {fix}; on node {pair.target}: {probes.allow(source, target)}"

    async def _run_round(self, nodes: Mapping[int, NodeConnection]) -> Sequence[NodeFailure]:
        """Runs one round to its end. Returns what went wrong; raises JobEnded when it ended well or was stopped."""
        before = {rank: node.hello.progress for rank, node in nodes.items()}
        run_id = f"{self.plan.run_name}-{self.round}-{next(iter(nodes.values())).hello.instance_id[:6]}"
        told = any(node.hello.told for node in nodes.values())
        self._places = nodes
        for index, node in enumerate(nodes.values()):
            place = {"node_rank": index, "nnodes": len(nodes), "failures": min(self.failures, LAST_ROUND), "told": told}
            node.connection.send("go", round=self.round, run_id=run_id, **place)
        for rank, node in self.membership.all().items():
            if rank not in nodes:
                self._let_wait(node.connection)
        if self._ending_since:
            self._handover = time.monotonic() - self._ending_since
        state = RoundState(
            names={rank: self.membership.name(rank) for rank in nodes},
            stop_grace=self.plan.timeouts.stop_grace,
            patience=self.plan.timeouts.heartbeat + 10,
            hang_report=self.plan.timeouts.hang_report,
            hang_timeout=self.plan.timeouts.hang_timeout,
            tell=lambda told: self.tell(told, "hang" if state.stands else "resumed"),
            halt=lambda why, grace, reason: self.membership.broadcast(
                "halt", text=reason, why=why, grace=math.ceil(grace)
            ),
        )
        self._running, ending = True, Waiting(0.0, self.tell)
        beside = [asyncio.ensure_future(each) for each in (self._copy_in_background(), self._grow(nodes, state))]
        while state.running:
            event = await self.next_event(state.limit)
            if event:
                state.take(event, time.monotonic())
                if event.kind == "lost" and event.rank not in nodes:
                    self.tell(f"{self.membership.name(event.rank)}, a spare, was lost: {event.why}. The round goes on")
            elif time.monotonic() >= state.limit:
                for rank in state.running:
                    self.membership.remove(nodes[rank])
                state.give_up(time.monotonic())
            state.check_hang(time.monotonic())
            if state.halted_at and state.running:
                if ending.start != state.halted_at:
                    ending = Waiting(state.limit - state.halted_at, self.tell, start=state.halted_at)
                ending.tell(lambda: f"{self.membership.names(state.running)} to end")
        self._running, self._ending_since = False, state.halted_at or time.monotonic()
        for each in beside:
            each.cancel()
        await asyncio.wait(beside, timeout=LAST_WORD)
        after = {rank: node.hello.progress for rank, node in self.membership.all().items()}
        if any(before.get(rank, progress) != progress for rank, progress in after.items()):
            self.failures, self._has_progressed, self._signature = 0, True, ("", "")
        return suspect_self(state.result(), self.membership.name(0), len(nodes) - 1, self._link())

    @property
    def _grows(self) -> bool:
        """Whether a round with too few nodes ends at its next checkpoint to let others in."""
        return self.plan.nodes.regrow and len(self._places) < self.plan.nodes.training

    def _handed_over(self) -> str:
        return " at the next checkpoint" + (f" (the last change took {self._handover:.1f} s)" if self._handover else "")

    async def _grow(self, nodes: Mapping[int, NodeConnection], state: RoundState) -> None:
        """Ends a round with too few nodes at the first checkpoint after another node has come."""
        seen = ""
        while self._grows:
            await asyncio.sleep(GROWTH)
            joining = [rank for rank in self.membership.all() if rank not in nodes]
            if not joining:
                seen = ""
                continue
            replies = await asyncio.gather(*(self.ask(rank, "progress", {}, PROGRESS) for rank in nodes))
            progress = "\n".join(text(reply, "progress", 200) for reply in replies if reply)
            if seen and progress != seen:
                state.grow(f"{self.membership.names(joining)} joins at this checkpoint", time.monotonic())
                return
            seen = progress or "none"

    async def _copy_in_background(self) -> None:
        if len(self.membership) > 1 and self.plan.checkpoints.mirror:
            await copy_in_background(self.plan, self.membership, self.ask, self.tell)

    async def _copy_last(self, verdict: Verdict) -> None:
        """A job that ends well or is stopped leaves its last checkpoints on a second node, within the grace of a stop:
        then Docker kills the container."""
        ended = verdict.code in (ExitCode.DONE, ExitCode.STOPPED) and self._ending_since
        if ended and len(self.membership) > 1 and self.plan.checkpoints.mirror:
            left = self._ending_since + self.plan.timeouts.stop_grace - time.monotonic()
            await copy_last(self.plan, self.membership, self.ask, self.tell, max(LAST_WORD, left))

    async def _restart_or_fail(self, failures: Sequence[NodeFailure]) -> None:
        """Another round after a pause, or JobEnded."""
        self.failures += 1
        cause, most = first_causes(failures)[0], self.plan.max_restarts
        self._cause = told = summarize(failures)
        if cause.not_retryable and not self._has_progressed:
            end = "Not started again, since it would end the same way."
            raise JobEnded(cause.code, f"{told}. {cause.not_retryable}. {end}", cause.found.cause, cause.found.fix)
        if self.failures > most:
            tries = f"{self.failures} failures in a row without a new checkpoint (MAX_RESTARTS={most})"
            raise JobEnded(cause.code, f"{told}. {tries}" if most else told, cause.found.cause, cause.found.fix)
        if any(cause.signature) and cause.signature == self._signature:
            twice = "The same error at the same place twice, without a new checkpoint between: not started again."
            raise JobEnded(cause.code, f"{told}. {twice}", cause.found.cause, cause.found.fix)
        self._signature = cause.signature
        pause = min(2.0 ** (self.failures - 2), LONGEST_PAUSE) if self.failures > 1 else 0.0
        when = f" in {pause:.0f} s" if pause else ""
        again = f"{told}. All nodes start again{when} (restart {self.failures} of {most})"
        self.tell(again, "restarting", cause.kind)
        await self.pause(pause)
