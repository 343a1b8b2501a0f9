"""Per-node participant, on node 0 too: joins, runs rounds, reports results, follows the coordinator."""

import asyncio
import contextlib
import math
import re
import secrets
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict, replace

from app.config.exitcodes import ExitCode
from app.engine.outcome import Collective, Failure, Outcome, Stall
from app.gang import probes
from app.gang.agreement import host_id
from app.gang.connect import RETRY, BusyError, NoAnswerError, Waiting, connect
from app.gang.connection import PATIENCE, Connection, Message, ProtocolError, UntrustedError, integer, items, text
from app.gang.handshake import introduce, is_translated
from app.gang.membership import BEATS, MICRO
from app.gang.messages import LAST_ROUND, LATEST, LISTEN, MOST_ENTERED, MOST_RANKS, YEAR_2100, JobEvent
from app.gang.services import Engine, NodeServices, RoundAssignment
from app.gang.verdict import JobEnded, Verdict
from app.plan import Plan

BUSY = 5.0
"""Seconds that node 0 waits for its own ports: an old torchrun may be about to end."""
STOPPED = Verdict(code=ExitCode.STOPPED, text="stopped before the training was done")


class Participant:
    """One node of a job. `take_part` returns when the job has ended for this node."""

    def __init__(
        self,
        plan: Plan,
        token: bytes,
        facts: Mapping[str, str],
        services: NodeServices,
        job: str = "training",
        fixed_ports: Sequence[int] | None = None,
    ) -> None:
        """`fixed_ports` are listened on for the reach test beside random ones; on node 0 MASTER_PORT, if not given."""
        self.plan = plan
        self.token = token
        self.facts = facts
        self.services = services
        self.job = job
        self.instance_id = secrets.token_hex(8)
        self.stops = 0
        self.trip = -1.0
        """Seconds that the last heartbeat to node 0 took there and back; negative until that is known."""
        self._ports = [plan.network.master_port] if plan.nodes.rank == 0 else []
        if fixed_ports is not None:
            self._ports = [*fixed_ports]
        self._stopping = asyncio.Event()
        self._stopped = False
        """Node 0 has said that the job is being stopped: wherever it ends from here, it was stopped."""
        self._connection: Connection | None = None
        self._bug: BaseException | None = None
        self._silence = ""
        self._key = secrets.token_hex(16)
        self._listener = probes.ProbeListener(self._key)
        self._engine: Engine | None = None
        self._run: asyncio.Task[None] | None = None
        """The engine to its end, and the report of it to node 0."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun = False
        """The roll call was complete at least once."""
        self._round = 0
        self._failures = 0
        self._before = ""
        self._halted = math.inf
        """When the engine was told to end, seconds since the epoch."""
        self._heard = 0.0
        self._stalled, self._run_id = list[tuple[int, str, tuple[Collective, ...]]](), ""

    def stop(self) -> None:
        """The user wants this job to end; called a second time, at once."""
        self.stops += 1
        self._stopping.set()
        if self.stops == 1:
            self._send("stop")
            self._end(gently=True, grace=self.plan.timeouts.stop_grace)
            return
        if self._engine:
            self._engine.kill()
        if self._connection:
            self._connection.abort()

    @property
    def connected(self) -> bool:
        """To node 0, at this moment."""
        return self._connection is not None

    async def take_part(self) -> Verdict:
        # One deadline, whatever connections are accepted and dropped meanwhile.
        waiting = self._waiting(self.plan.timeouts.start)
        try:
            while True:
                connection = await self._join(waiting)
                if isinstance(connection, Verdict):
                    return connection
                verdict = await self._follow(connection)
                if verdict:
                    return verdict
                if self.stops or self._stopped:
                    return STOPPED
                if self._begun:
                    waiting = self._waiting(self.plan.timeouts.rejoin)
                elif waiting.over:
                    return self._timed_out(waiting, "it accepts connections and closes them")
                # Who accepts and hangs up again and again must not keep this node busy.
                await self._rest(RETRY)
        finally:
            self._listener.close()
            if self._engine:
                self._engine.kill()
            for task in self._tasks:
                task.cancel()

    def _waiting(self, seconds: float) -> Waiting:
        return Waiting(seconds if self.plan.nodes.rank else min(seconds, BUSY), self.services.say)

    async def _join(self, waiting: Waiting) -> Connection | Verdict:
        """Connects to node 0 and says hello, again and again until it works or the time is over."""
        self.services.state("waiting", self._round)
        try:
            return await connect(self._greet, self._node0, waiting, self._rest) or STOPPED
        except UntrustedError as error:
            return Verdict(code=ExitCode.UNTRUSTED, text=str(error))
        except JobEnded as end:
            return end.verdict
        except NoAnswerError as error:
            return self._timed_out(waiting, str(error)) if self.plan.nodes.rank else self._port_taken(str(error))

    @property
    def _node0_name(self) -> str:
        return f"node 0 ({self.plan.nodes.addresses[0]})"

    @property
    def _node0(self) -> str:
        return f"node 0, {self.plan.nodes.addresses[0]} port {self.plan.network.control_port}"

    async def _rest(self, seconds: float) -> bool:
        """Whether the user wants this job to end; waits a little for that."""
        with contextlib.suppress(TimeoutError):
            # Python 3.11's wait_for swallows a cancel that comes as the awaited ends.
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        return self.stops > 0

    def _timed_out(self, waiting: Waiting, why: str) -> Verdict:
        seconds = waiting.until - waiting.start
        if self._begun and not seconds:
            return Verdict(code=ExitCode.LOST, text=f"node 0 was lost: {why}")
        if self._begun:
            told = f"node 0 was lost; timed out after {seconds:.0f} s (REJOIN_TIMEOUT) waiting for {self._node0}: {why}"
            return Verdict(code=ExitCode.LOST, text=told)
        told = f"timed out after {seconds:.0f} s (START_TIMEOUT) waiting for {self._node0}: {why}"
        fix = f"start it there, and let this node in: {probes.allow(self.plan.network.address)}"
        return Verdict(code=ExitCode.UNREACHABLE, text=f"{told}. Fix: {fix}")

    def _port_taken(self, why: str) -> Verdict:
        """Node 0 does not get one of its own ports."""
        self._listener.close()
        network = self.plan.network
        for name, port in (("MASTER_PORT", network.master_port), ("CONTROL_PORT", network.control_port)):
            if holder := self.services.holder(port):
                told = f"node 0 cannot listen on {network.address} port {port} ({name}): {holder} has it"
                fix = "end that, or set another MASTER_PORT on all nodes."
                return Verdict(code=ExitCode.SETTINGS, text=f"{told}. Fix: {fix}")
        told = f"node 0: port {network.control_port} (CONTROL_PORT) was taken, and is free again ({why})"
        return Verdict(code=ExitCode.FAILED, text=f"{told}. Start node 0 once more.")

    async def _greet(self) -> Connection:
        connection = await self.services.dial()
        try:
            self._try_ports()
            hello = {
                "run": self.plan.run_name,
                "job": self.job,
                "rank": self.plan.nodes.rank,
                "host": host_id(),
                "instance_id": self.instance_id,
                "key": self._key,
                "facts": dict(self.facts),
                "round": self._round,
                "failures": self._failures,
                "progress": self.services.progress(),
                "told": self.services.told(),
            }
            await introduce(connection, self.token, hello, translated=is_translated(self.plan))
            connection.give_up_after(PATIENCE * self.plan.timeouts.heartbeat)
            reply = await connection.receive()
            if reply["kind"] == "busy":
                raise BusyError(text(reply, "text"))
            if reply["kind"] != "joined":
                verdict = _verdict(reply)
                raise JobEnded(verdict.code, verdict.text, verdict.cause, verdict.fix)
        except BaseException:
            connection.close()
            raise
        return connection

    def _try_ports(self) -> None:
        """Node 0 tries the port that torchrun needs next. Raises OSError."""
        try:
            for fixed in self._ports:
                probes.try_port(fixed)
        except OSError as error:
            where = f"{self.plan.network.address} port {self._ports[0]} (MASTER_PORT)"
            raise OSError(f"this node cannot listen on {where}: {probes.why(error)}") from None

    async def _listen(self) -> dict[str, object]:
        """Listens for the peers' connections, until node 0 has heard of all."""
        try:
            await self._listener.open(self.plan.network.address, self._ports)
        except OSError as error:
            self.services.say(f"this node cannot listen for the others' connections: {probes.why(error)}")
        return {"ports": [{"port": port} for port in self._listener.ports]}

    async def _follow(self, connection: Connection) -> Verdict | None:
        """Does what node 0 says until there is a verdict; None when node 0 is lost and torchrun has ended."""
        self._connection, self._silence, self._heard = connection, "", time.monotonic()
        self._tell("node-0-found", "")
        if self.stops:
            self._send("stop")
        beating = self._spawn(self._beat(connection))
        try:
            while True:
                message = await connection.receive()
                self._heard = time.monotonic()
                if verdict := self._obey(connection, message):
                    return verdict
        except ProtocolError as error:
            why = f"protocol error: {error}"
        except OSError as error:
            why = self._silence or str(error)
        finally:
            self._connection = None
            beating.cancel()
            connection.close()
        if self.stops > 1:
            return STOPPED
        self._abandon(why)
        if self._run:
            await self._run
        if self._bug:
            raise self._bug
        return None

    def _send(self, kind: str, **fields: object) -> None:
        if self._connection:
            self._connection.send(kind, **fields)

    async def _beat(self, connection: Connection) -> None:
        """Sends heartbeats, and tries what it can when node 0 sends none, until it counts as lost."""
        beat = self.plan.timeouts.heartbeat / BEATS
        while True:
            connection.send("beat", at=round(time.monotonic() * MICRO), trip=round(self.trip * MICRO))
            self._send_stalls(connection)
            await asyncio.sleep(beat)
            silence = time.monotonic() - self._heard
            if silence > self.plan.timeouts.heartbeat:
                self._silence = self.services.link() or f"no heartbeat for {silence:.0f} s"
                connection.abort()
                return
            if silence > 3 * beat:
                self._spawn(self._pulse(2 * beat))

    def _send_stalls(self, connection: Connection) -> None:
        """Tells node 0 that no rank of this node makes progress, and where they are; or that one does again."""
        # What was seen a moment ago may be of the round before.
        seen = [stall for stall in self.services.stalls() if stall.run_id in ("", self._run_id)]
        stalls = seen[:MOST_RANKS] if self._engine else []
        # A line has room for some 128 collectives.
        most = max(1, min(MOST_ENTERED, 128 // max(1, len(stalls))))
        stalls = [replace(stall, entered=stall.entered[-most:]) for stall in stalls]
        places = [(stall.rank, stall.at, stall.entered) for stall in stalls]
        if places != self._stalled:
            self._stalled = places
            connection.send("stalled", ranks=[asdict(stall) for stall in stalls])

    async def _pulse(self, seconds: float) -> None:
        """Tries a new connection while the old one is silent: after a short cut TCP itself may wait for longer than
        HEARTBEAT_TIMEOUT before it tries again, since it doubles its pauses."""
        with contextlib.suppress(OSError, TimeoutError, ProtocolError):
            async with asyncio.timeout(seconds):
                connection = await self.services.dial()
                try:
                    hello = {"run": self.plan.run_name, "job": self.job, "pulse": self.instance_id}
                    await introduce(connection, self.token, hello, translated=is_translated(self.plan))
                    await connection.expect("beat")
                    self._heard = time.monotonic()
                finally:
                    connection.close()

    def _obey(self, connection: Connection, message: Message) -> Verdict | None:
        """One message of node 0."""
        kind = message["kind"]
        if kind in ("verdict", "refuse"):
            return _verdict(message)
        if kind == "news":
            told = text(message, "text", 8000, lines=True)
            self.services.say(told)
            if "event" in message:
                self._tell(text(message, "event", 20), told, text(message, "cause", 20))
        elif kind == "beat":
            if "at" in message:
                held = integer(message, "held", 0, LATEST) + integer(message, "at", 0, LATEST)
                self.trip = max(0.0, time.monotonic() - held / MICRO)
        elif kind == "probed":
            self._listener.close()
        elif kind == "probe":
            self._begun = True
            found = [_target(item) for item in items(message, "targets", 6 * self.plan.nodes.count)]
            self._spawn(self._probe(connection, found))
        elif kind == "ask":
            self._begun = True
            number = integer(message, "number", 0, 1 << 60)
            self._watch(self._spawn(self._answer(connection, text(message, "question", 40), number, message)))
        elif kind == "wait":
            self.services.state("spare", integer(message, "round", 1, LAST_ROUND))
            self.services.say(text(message, "text"))
        elif kind == "go":
            self._go(message)
        elif kind == "halt":
            ending = "; stopping local workers" if self._engine else ""
            self.services.say(text(message, "text", lines=True) + ending)
            self._stopped = self._stopped or message.get("why") == "stop"
            self._end(gently=message.get("why") in ("stop", "grow"), grace=float(integer(message, "grace", 0, 1 << 20)))
        return None

    async def _probe(self, connection: Connection, found: list[probes.Target]) -> None:
        failed = await probes.dial_all(self.plan.network.address, found)
        told = [{"rank": target.rank, "port": target.port, "why": why} for target, why in failed]
        connection.send("reached", failed=told)

    async def _answer(self, connection: Connection, question: str, number: int, message: Message) -> None:
        answer = self._listen() if question == LISTEN else self.services.answer(question, message)
        connection.send("answer", number=number, **await answer)

    def _go(self, message: Message) -> None:
        if self.services.launch is None:
            raise ProtocolError("a round of training, which this node did not come for")
        size, run_id = integer(message, "nnodes", 1, self.plan.nodes.count), text(message, "run_id", 200)
        # It names files.
        if not re.fullmatch(r"\w[\w.-]*", run_id, re.ASCII):
            raise ProtocolError(f"run_id {run_id!r} is not a name")
        place = RoundAssignment(
            round=integer(message, "round", 1, 1 << 30),
            run_id=run_id,
            node_rank=integer(message, "node_rank", 0, size - 1),
            nnodes=size,
        )
        self._listener.close()
        again = f"the nodes go on with round {place.round}"
        if place.round == 1:
            nodes = f"{size} nodes" if size > 1 else "1 node"
            self._tell("started", f"{nodes} with {self.plan.workers.nproc} processes each started")
        elif not self._round and not self.plan.nodes.rank and message.get("told") is not True:
            # The others went through rounds that this process does not know.
            self._tell("back", f"{self._node0_name} was lost in round {place.round - 1} and came back; {again}")
        self._round, self._failures = min(place.round, LAST_ROUND), integer(message, "failures", 0, LAST_ROUND)
        self._before = self.services.progress()
        self._halted = math.inf
        self._stalled, self._run_id = [], place.run_id
        self.services.state("running", self._round)
        try:
            self._engine = self.services.launch(place)
        except OSError as error:  # Such as arguments that are too long: no fault of the connection.
            self._run = self._spawn(self._tell_end(_broke(error)))
        else:
            self._run = self._spawn(self._run_engine(self._engine))
        self._watch(self._run)

    def _watch(self, task: asyncio.Task[None]) -> None:
        """A bug in `task` must end this node, not let node 0 wait for its word."""

        def left(done: asyncio.Task[None]) -> None:
            self._bug = self._bug or (None if done.cancelled() else done.exception())
            if self._bug and self._connection:
                self._connection.abort()

        task.add_done_callback(left)

    async def _run_engine(self, engine: Engine) -> None:
        """One torchrun to its end."""
        try:
            outcome = await engine.watch(self._fails)
        except Exception as error:  # Whatever it said: node 0 waits for this node's end.
            outcome = _broke(error)
        engine.kill()
        self._engine = None
        await self._tell_end(outcome)

    async def _tell_end(self, outcome: Outcome) -> None:
        if left := self.services.clean():
            self.services.say(f"killed {left} orphaned worker process{'es' if left > 1 else ''}")
        await self.services.released()
        await self.services.refresh()
        self.services.state("waiting", self._round)
        reports = await self._reports(outcome)
        finished = "" if outcome.failures else self._finished(await self.services.ended(), outcome)
        progress = self.services.progress()
        self._send("ended", code=_clamp(outcome.code), failures=reports, finished=finished, progress=progress)

    def _finished(self, stalls: Sequence[Stall], outcome: Outcome) -> str:
        """After which collective all ranks of this node ended by themselves; "" if not all have, or it is unknown.
        Scripts that end well because they are told to have not finished."""
        ended = [each for each in stalls if each.ended and each.run_id == self._run_id and each.time < self._halted]
        if len(ended) < self.plan.workers.nproc:
            return "its last step" if outcome.finished else ""
        entered = [one for stall in ended for one in stall.entered[-1:] if one.sequence]
        last = max(entered, key=lambda one: one.sequence, default=None)
        return f"{last.name} #{last.sequence}" if last else "no collective"

    def _fails(self) -> None:
        """A worker failed: the first sign, long before torchrun says which and why."""
        if self._halted == math.inf:
            self._send("failing")

    async def _reports(self, outcome: Outcome) -> list[dict[str, object]]:
        """At most one failure: the first worker's, or torchrun's own."""
        itself = Failure(rank=-1, exitcode=outcome.code, text="", time=time.time())
        first = next(iter(outcome.failures), itself)
        if not outcome.code or (outcome.halted and first is itself):
            return []
        at = max(0, min(YEAR_2100, round(first.time * 1000)))
        found = asdict(await self.services.explain(self._run_id, first))
        alike = [each for each in outcome.failures if _ended_with(first, each)]
        return [
            {
                "rank": first.rank,
                "exitcode": _clamp(first.exitcode),
                "time": at,
                "halted": outcome.halted,
                "alike": max(0, len(alike) - 1),
                **found,
            }
        ]

    def _end(self, *, gently: bool, grace: float) -> None:
        # Once: a second SIGTERM would cut torchrun's own orderly end short.
        if self._engine and self._halted == math.inf:
            self._halted = time.time()
            self.services.state("stopping", self._round)
            self._spawn(self._engine.end(gently=gently, grace=grace))

    def _abandon(self, why: str) -> None:
        """Node 0 is lost: nothing of this round can be saved."""
        told = f"{self._node0_name} was lost: {why}"
        self.services.say(told)
        if self._begun and not self.stops and not self._stopped:
            self._tell("node-0-lost", told)
        self._end(gently=False, grace=2.0)
        if self._engine:
            self._failures = 1 if self.services.progress() != self._before else self._failures + 1

    def _tell(self, kind: str, told: str, cause: str = "") -> None:
        self.services.event(JobEvent(kind=kind, text=told, cause=cause))

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _ended_with(first: Failure, other: Failure) -> bool:
    """Whether the same signal has ended both at the same moment. torchrun itself ends the others by SIGTERM."""
    same = first.exitcode == other.exitcode and first.exitcode < 0 and first.exitcode != -signal.SIGTERM
    return same and abs(first.time - other.time) <= 1.0


def _verdict(message: Message) -> Verdict:
    code = integer(message, "code", 0, 255)
    known = ExitCode(code) if code in {*ExitCode} else ExitCode.FAILED
    cause, fix = text(message, "cause", 1000), text(message, "fix", 1000)
    return Verdict(code=known, text=text(message, "text", 8000, lines=True), cause=cause, fix=fix)


def _target(item: Message) -> probes.Target:
    return probes.Target(
        rank=integer(item, "rank", 0, 1 << 20),
        address=text(item, "address", 64),
        port=integer(item, "port", 1, 65535),
        key=text(item, "key", 64),
    )


def _clamp(code: int) -> int:
    return max(-64, min(255, code))


def _broke(error: Exception) -> Outcome:
    """The end of a torchrun that could not be started or understood."""
    itself = Failure(rank=-1, exitcode=1, text=f"{type(error).__name__}: {error}", time=time.time())
    return Outcome(code=1, failures=(itself,))
