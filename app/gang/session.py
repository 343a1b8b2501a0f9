"""The coordinator's side of every meeting of the nodes, a training or `doctor`: it admits them, knows who is here,
hears what they say, asks them, and tells all of them how it ended."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from app.config.exitcodes import ExitCode
from app.gang import probes
from app.gang.connect import SAY_AFTER, Waiting
from app.gang.connection import PATIENCE, Connection, Message, ProtocolError, UntrustedError, integer, text
from app.gang.connectivity import Connectivity
from app.gang.handshake import Admission
from app.gang.membership import MICRO, Membership, NodeConnection
from app.gang.messages import LATEST, LISTEN, Event, Hello, Say, read_event, read_hello, read_ports
from app.gang.verdict import JobEnded, Verdict
from app.plan import Plan

Answer = TypeVar("Answer")
STRAGGLERS = 2.0
"""Seconds that a disagreement waits for nodes still on their way, so that one table shows all."""
LAST_WORD = 2.0
"""Seconds until everybody has read the verdict."""
BACKLOG = 1000
"""Back-pressure: no connection is read while more events than these wait to be judged."""
LISTENING = 20.0
"""Seconds for the answer where a node listens; one that is not heard at all is lost before."""
PRESENCE = 0.25
"""Seconds between two looks for silent nodes."""


class RefusedError(ProtocolError):
    """A node of this cluster that cannot take part as it is; `rank` where it told, else -1."""

    def __init__(self, text: str, rank: int = -1) -> None:
        super().__init__(text)
        self.rank = rank


class Session:
    """The nodes of one job as node 0 sees them. `say` prints on this node's terminal."""

    job = "training"

    def __init__(self, plan: Plan, token: bytes, say: Say) -> None:
        self.plan = plan
        self.say = say
        self.membership = Membership(plan)
        self.verdict: Verdict | None = None
        self._admission = Admission(plan=plan, token=token)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._numbers = itertools.count()
        self._logged = 0.0
        self._told = set[int]()
        """Nodes that came after the verdict, and were told it."""

    def objection(self, hello: Hello) -> str:
        """Why a node may not take part, or ""."""
        raise NotImplementedError

    def welcome(self, connection: Connection) -> None:
        """A node has become a member."""

    def conclude(self, verdict: Verdict) -> None:
        """Ends the job for all, if it has not ended yet."""
        self.verdict = self.verdict or verdict

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from the handshake to its end."""
        connection, node = Connection(reader, writer), None
        try:
            message = await self._admission.admit(connection)
            node = await self._admit(connection, message)
            while node:
                self._take(node, await connection.receive())
                while self._events.qsize() > BACKLOG:
                    await asyncio.sleep(PRESENCE)
        except ProtocolError as error:
            if node:
                self.lose(node, f"protocol error: {error}")
            else:
                self._log_rejected(connection, error)
        except OSError as error:
            if node:
                self.lose(node, f"{error} (its container, engine or machine ended)")
            else:
                self._log_rejected(connection, error)
        except asyncio.CancelledError:
            pass  # the loop ends; Python 3.11's asyncio.streams would print a traceback of its own
        finally:
            connection.close()

    async def _admit(self, connection: Connection, message: Message) -> NodeConnection | None:
        """Makes a node a member; None for one that only had a word to say. Raises ProtocolError for a refusal."""
        self._check_job(connection, message)
        if "pulse" in message:
            # A heartbeat by a connection of its own, from a node whose first one is stuck.
            if self.membership.pulse(text(message, "pulse", 64)):
                connection.send("beat")
            return None
        if "unfit" in message:
            why = f"it cannot start: {text(message, 'unfit', 2000)}"
            raise RefusedError(why, integer(message, "rank", -1, 1 << 16))
        hello = read_hello(message, connection.peer)
        if self.verdict:
            self._told.add(hello.rank)
            self._events.put_nowait(Event(rank=hello.rank, kind="joined"))
            connection.send("verdict", **_told(self.verdict))
            await connection.closed()
            return None
        if objection := self._beyond(hello) or self.objection(hello):
            connection.send("refuse", **_told(Verdict(code=ExitCode.DISAGREE, text=objection)))
            raise RefusedError(f"refused: {objection}")
        if before := self.membership.get(hello.rank):
            self.lose(before, "reconnected after its connection dropped")
        connection.give_up_after(PATIENCE * self.plan.timeouts.heartbeat)
        connection.send("joined")
        self.welcome(connection)
        self._events.put_nowait(Event(rank=hello.rank, kind="joined"))
        return self.membership.add(connection, hello)

    def _check_job(self, connection: Connection, message: Message) -> None:
        run, job = text(message, "run", 100), text(message, "job", 20)
        here = f"{self.plan.nodes.addresses[0]} port {self.plan.network.control_port}".strip()
        if job != self.job:
            if job == "training":
                # It keeps trying, and comes to its job once this is over.
                connection.send("busy", text=f"{self.job} is running there")
                raise RefusedError(f"{self.job} was not started there: it waits to train")
            told = f"{here} runs the {self.job} {self.plan.run_name!r}, which {job} would disturb"
            connection.send("refuse", **_told(Verdict(code=ExitCode.DISAGREE, text=f"{told}. Stop it first.")))
            raise RefusedError(f"it came for {job}, and this is a {self.job}")
        if run != self.plan.run_name:
            told = f"{here} belongs to another job, run {self.plan.run_name!r}; this node's is {run!r}"
            fix = "Set the same RUN_NAME, or another MASTER_PORT."
            connection.send("refuse", **_told(Verdict(code=ExitCode.DISAGREE, text=f"{told}. {fix}")))
            raise RefusedError(f"its RUN_NAME is {run!r}, here it is {self.plan.run_name!r}")

    def _beyond(self, hello: Hello) -> str:
        """A node with a longer list is never a member, but its list is shown beside the others'."""
        if hello.rank < self.plan.nodes.count:
            return ""
        self.membership.beyond[hello.rank] = hello.facts
        listed = f"node {hello.rank} is not one of the {self.plan.nodes.count} nodes in node 0's NODES"
        return "\n".join(filter(None, [listed, self.membership.disagreement(hello)]))

    def _take(self, node: NodeConnection, said: Message) -> None:
        node.heard = time.monotonic()
        if said["kind"] == "answer":
            waiting = node.answers.pop(integer(said, "number", 0, 1 << 60), None)
            if waiting and not waiting.done():
                waiting.set_result(said)
        elif said["kind"] == "beat":
            if "at" in said:
                node.at = integer(said, "at", 0, LATEST)
                node.trip = integer(said, "trip", -MICRO, LATEST) / MICRO
        else:
            event = read_event(said, node.hello.rank, self.plan.nodes.count)
            if event.kind == "ended":
                node.hello = replace(node.hello, progress=text(said, "progress", 200))
            self._events.put_nowait(event)

    def lose(self, node: NodeConnection, why: str, *, silent: bool = False) -> None:
        """Counts a node as lost, if it is still here."""
        if self.membership.remove(node):
            self._events.put_nowait(Event(rank=node.hello.rank, kind="lost", why=why, silent=silent))

    def _log_rejected(self, connection: Connection, error: Exception) -> None:
        """Says at once why a listed node was rejected; of others one line in a while, so that an attacker does not fill
        the log."""
        known = isinstance(error, (UntrustedError, RefusedError))
        told = error.rank if isinstance(error, RefusedError) else -1
        rank = self.membership.reject(connection.peer, told, str(error)) if known else None
        if rank is not None:
            self.tell(f"{self.membership.name(rank)} was turned away: {error}")
            if not len(self.membership):
                self.say(f"{self.membership.name(rank)} was turned away: {error}")
        elif connection.peer and time.monotonic() > self._logged + SAY_AFTER:
            self._logged = time.monotonic()
            self.say(f"rejected connection from {connection.peer}: {error}")

    async def ask(self, rank: int, question: str, fields: Mapping[str, object], seconds: float) -> Message | None:
        """One node's answer; None if it is lost, or does not answer in time and is given up."""
        node = self.membership.get(rank)
        if node is None:
            return None
        number = next(self._numbers)
        answer = node.answers[number] = asyncio.get_running_loop().create_future()
        node.connection.send("ask", question=question, number=number, **fields)
        try:
            async with asyncio.timeout(seconds):
                found: Message | None = await answer
                return found
        except TimeoutError:
            self.lose(node, f"no answer to {question!r} within {seconds:.0f} s")
            return None

    async def ask_for(
        self, read: Callable[[Message], Answer], rank: int, question: str, fields: Mapping[str, object], seconds: float
    ) -> Answer | None:
        """The same, read. A node whose answer is none (`read` raises ProtocolError) is lost, and node 0 goes on."""
        answer = await self.ask(rank, question, fields, seconds)
        try:
            return None if answer is None else read(answer)
        except ProtocolError as error:
            if node := self.membership.get(rank):
                self.lose(node, f"protocol error: {error}")
            return None

    async def roll_call(
        self, waiting: Waiting, settled: Callable[[], bool], enough: Callable[[], bool] = lambda: False
    ) -> None:
        """Waits until all nodes are here or `enough` of them, the time is over, or it is `settled` that waiting for the
        rest is no use."""
        probing = asyncio.create_task(self._probe_missing())
        try:
            while self.membership.missing() and not waiting.over and not enough():
                waiting.tell(self._whom)
                await self.rest(min(waiting.until, time.monotonic() + 0.5))
                if settled():
                    await self.pause(STRAGGLERS)
                    if settled():
                        return
        finally:
            probing.cancel()

    def _whom(self) -> str:
        here = f"{len(self.membership)} of {self.plan.nodes.count} nodes connected"
        return f"{self.membership.reasons(self.membership.missing())}; {here}"

    async def _probe_missing(self) -> None:
        """Keeps finding out why nodes are missing. Nobody listens there: the kind of refusal is the news."""
        while True:
            await asyncio.sleep(SAY_AFTER / 2)
            known = self.membership.rejected
            missing = [rank for rank in self.membership.missing()[:16] if rank and self.plan.nodes.addresses[rank]]
            asked = [rank for rank in missing if rank not in known]
            port, addresses = self.plan.network.control_port, self.plan.nodes.addresses
            reasons = await asyncio.gather(*(probes.absence(addresses[rank], port) for rank in asked))
            self.membership.absent.update(zip(asked, reasons, strict=True))
            self.membership.absent.update({rank: known[rank] for rank in missing if rank in known})

    async def connectivity(self, proven: Mapping[int, NodeConnection] = MappingProxyType({})) -> Connectivity:
        """Lets every node dial its share of the others, and waits for what they found. Those of `proven` that are still
        connected as they were do not dial each other."""
        nodes = self.membership.all()
        known = frozenset(rank for rank, node in nodes.items() if proven.get(rank) is node)
        state = Connectivity(ranks=list(nodes), started=time.monotonic(), known=known)
        # A node alone is dialled by nobody.
        dialled = [*{peer: None for rank in nodes for peer in state.peers(rank)}]
        ports = await asyncio.gather(*(self._ports(rank) for rank in dialled))
        listening = dict(zip(dialled, ports, strict=True))
        state.started = time.monotonic()
        for rank, node in nodes.items():
            found = [
                {"rank": peer, "address": self.membership.address(hello), "port": port, "key": hello.key}
                for peer in state.peers(rank)
                for hello in [nodes[peer].hello]
                for port in listening[peer][: state.ports_of(peer)]
            ]
            node.connection.send("probe", targets=found)
        waiting = Waiting(state.limit - state.started, self.tell, start=state.started)
        while not state.done(time.monotonic()):
            if state.pending:
                waiting.tell(lambda: f"{self.membership.names(state.pending)} to try whom it reaches")
            event = await self.rest(state.until)
            if event:
                state.take(event, time.monotonic())
        self.membership.broadcast("probed")
        state.here = {rank for rank, node in nodes.items() if self.membership.holds(node)}
        return state

    async def _ports(self, rank: int) -> tuple[int, ...]:
        """Where a node listens for its peers; () if it is lost."""
        return await self.ask_for(read_ports, rank, LISTEN, {}, LISTENING) or ()

    async def finish(self, verdict: Verdict, linger: float = 0.0) -> None:
        """Tells everyone the verdict, and waits a little until they have hung up: then they have read it. Those who are
        still missing are told for `linger` seconds, if they come: they would wait until START_TIMEOUT."""
        self.verdict = verdict
        self.membership.broadcast("verdict", **_told(verdict))
        late = {*self.membership.missing()} - {0} if linger else set[int]()
        if late:
            self.say(f"waiting up to {linger:.0f} s to deliver the verdict to {self.membership.names(late)}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(linger if late else LAST_WORD):
                while len(self.membership) or late - self._told:
                    await self._events.get()

    async def pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await self.rest(until)

    async def rest(self, until: float) -> Event | None:
        """Like `next_event`, outside a round: a stop ends the job."""
        event = await self.next_event(until)
        if event and event.kind == "stop":
            name = self.membership.name(event.rank)
            raise JobEnded(ExitCode.STOPPED, f"stopped on {name} before the training was done")
        return event

    async def next_event(self, until: float) -> Event | None:
        """The next event; None after a moment, or at `until`. Raises JobEnded once there is a verdict."""
        if self.verdict:
            raise JobEnded(self.verdict.code, self.verdict.text, self.verdict.cause, self.verdict.fix)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(0.3, until - time.monotonic()))):
                return await self._events.get()
        return None

    async def keep_presence(self) -> None:
        """Sends heartbeats, and counts a node as lost that sends none for HEARTBEAT_TIMEOUT."""
        beaten = looked = time.monotonic()
        while True:
            await asyncio.sleep(min(PRESENCE, self.membership.interval))
            now = time.monotonic()
            late, looked = now - looked > 2.0, now
            if now >= beaten + self.membership.interval:
                beaten = now
                for node in self.membership.all().values():
                    node.connection.send("beat", **node.echo(now))
            # Whoever stood still itself (SIGSTOP, a machine that slept) has heard nobody, and reads first.
            for node in [] if late else self.membership.silent():
                why = f"no heartbeat for {self.plan.timeouts.heartbeat:g} s (machine down, or its link is cut)"
                self.lose(node, why, silent=True)

    def tell(self, what: str, event: str = "", cause: str = "") -> None:
        """Prints on all nodes that are here, node 0 included. An `event` is that of a JobEvent."""
        self.membership.broadcast("news", text=what, **({"event": event, "cause": cause} if event else {}))


def _told(verdict: Verdict) -> dict[str, object]:
    return {"code": int(verdict.code), "text": verdict.text, "cause": verdict.cause, "fix": verdict.fix}
