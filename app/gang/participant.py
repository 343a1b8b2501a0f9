"""Every node's part, node 0 included: come, answer, run the rounds, say how they ended, obey."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from app.config.exitcodes import ExitCode
from app.engine.outcome import Collective, Failure, Outcome, Stall
from app.gang import connectivity
from app.gang.agreement import host_id
from app.gang.connect import NobodyError, Waiting, arrive
from app.gang.connection import (
    PATIENCE,
    Message,
    UntrustedError,
    Wire,
    WireError,
    integer,
    introduce,
    items,
    text,
)
from app.gang.membership import BEATS
from app.gang.messages import MOST_ENTERED, MOST_RANKS, Say
from app.gang.verdict import Verdict
from app.plan import Plan

BUSY = 5.0
"""Seconds that node 0 waits for its own ports: an old torchrun may be about to end."""
STOPPED = Verdict(code=ExitCode.STOPPED, text="stopped before the training was done")


class Engine(Protocol):
    """A running torchrun, as far as the gang cares (app.engine.torchrun.Torchrun)."""

    async def watch(self, failing: Callable[[], None]) -> Outcome: ...

    async def end(self, *, gently: bool, grace: float) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This node's place in a round."""

    round: int
    run_id: str
    node_rank: int
    nnodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a member needs of its node."""

    dial: Callable[[], Awaitable[Wire]]
    """Connects to node 0. Raises OSError."""
    launch: Callable[[Place], Engine]
    clean: Callable[[], int]
    """Ends whatever torchrun left behind; returns how many processes that were."""
    progress: Callable[[], str]
    """A text that changes with every checkpoint, as it was a moment ago."""
    stalls: Callable[[], Sequence[Stall]]
    """All ranks of this node, if none of them moved a moment ago."""
    look: Callable[[], Awaitable[None]]
    """Brings `progress` and `stalls` up to date, if the file system answers soon."""
    say: Say
    holder: Callable[[int], str]
    """Who listens on a TCP port of this machine, for people; "" for nobody."""
    state: Callable[[str, int], None]
    """Told of every change: (waiting, running or stopping; the round)."""


class Member:
    """One node of the gang. `take_part` returns when the job has ended for this node."""

    def __init__(self, plan: Plan, token: bytes, facts: Mapping[str, str], around: Surroundings) -> None:
        self.plan = plan
        self.token = token
        self.facts = facts
        self.around = around
        self.life = secrets.token_hex(8)
        self.stops = 0
        self._stopping = asyncio.Event()
        self._stopped = False
        """Node 0 has said that the job is being stopped: wherever it ends from here, it was stopped."""
        self._wire: Wire | None = None
        self._silence = ""
        self._key = secrets.token_hex(16)
        self._answering = connectivity.Answering(self._key)
        self._engine: Engine | None = None
        self._run: asyncio.Task[None] | None = None
        """The engine to its end, and the word about it to node 0."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._round = 0
        self._failures = 0
        self._before = ""
        self._halted = False
        """The engine was told to end."""
        self._heard = 0.0
        self._stalled, self._run_id = list[tuple[int, str, tuple[Collective, ...]]](), ""

    def stop(self) -> None:
        """The user wants this job to end; called a second time, at once."""
        self.stops += 1
        self._stopping.set()
        if self.stops == 1:
            self._tell("stop")
            self._end(gently=True, grace=self.plan.timeouts.stop_grace)
            return
        if self._engine:
            self._engine.kill()
        if self._wire:
            self._wire.abort()

    async def take_part(self) -> Verdict:
        limit = self.plan.timeouts.start
        try:
            while True:
                wire = await self._join(limit)
                if isinstance(wire, Verdict):
                    return wire
                verdict = await self._obey(wire)
                if verdict:
                    return verdict
                if self.stops or self._stopped:
                    return STOPPED
                limit = self.plan.timeouts.rejoin if self._round else limit
        finally:
            self._answering.close()
            if self._engine:
                self._engine.kill()
            for task in self._tasks:
                task.cancel()

    async def _join(self, limit: float) -> Wire | Verdict:
        """Connects to node 0 and says hello, again and again for `limit` seconds."""
        self.around.state("waiting", self._round)
        waiting = Waiting(limit if self.plan.nodes.rank else min(limit, BUSY), self.around.say)
        node0 = f"node 0, {self.plan.nodes.addresses[0]} port {self.plan.network.control_port}"
        try:
            return await arrive(self._greet, node0, waiting, self._rest) or STOPPED
        except UntrustedError as error:
            return Verdict(code=ExitCode.UNTRUSTED, text=str(error))
        except NobodyError as error:
            return self._nobody(node0, waiting.waited, str(error)) if self.plan.nodes.rank else self._taken(str(error))

    async def _rest(self, seconds: float) -> bool:
        """Whether the user wants this job to end; waits a little for that."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self.stops > 0

    def _nobody(self, node0: str, waited: float, why: str) -> Verdict:
        if self._round:
            told = f"{node0} was lost and not back within {waited:.0f} s (REJOIN_TIMEOUT): {why}"
            return Verdict(code=ExitCode.LOST, text=told)
        told = f"{node0} did not answer within {waited:.0f} s (START_TIMEOUT): {why}"
        cure = f"Start it there, and let this node in: {connectivity.let_in(self.plan.network.address)}"
        return Verdict(code=ExitCode.UNREACHABLE, text=f"{told}. {cure}")

    def _taken(self, why: str) -> Verdict:
        """Node 0 does not get one of its own ports."""
        self._answering.close()
        for name, port in (
            ("MASTER_PORT", self.plan.network.master_port),
            ("CONTROL_PORT", self.plan.network.control_port),
        ):
            if holder := self.around.holder(port):
                told = f"node 0 cannot listen on {self.plan.network.address} port {port} ({name}): {holder} has it"
                cure = "End that, or set another MASTER_PORT on all nodes."
                return Verdict(code=ExitCode.SETTINGS, text=f"{told}. {cure}")
        told = f"node 0: port {self.plan.network.control_port} (CONTROL_PORT) was taken, and is free again ({why})"
        return Verdict(code=ExitCode.FAILED, text=f"{told}. Start node 0 once more.")

    async def _greet(self) -> Wire:
        wire = await self.around.dial()
        try:
            try:
                await self._listen()
            except OSError as error:
                port = f" port {self.plan.network.master_port} (MASTER_PORT)" * (self.plan.nodes.rank == 0)
                raise OSError(
                    f"this node cannot listen on {self.plan.network.address}{port}: {connectivity.why(error)}"
                ) from None
            hello = {
                "run": self.plan.run_name,
                "rank": self.plan.nodes.rank,
                "nnodes": self.plan.nodes.count,
                "host": host_id(),
                "life": self.life,
                "key": self._key,
                "facts": dict(self.facts),
                "round": self._round,
                "failures": self._failures,
                **self._ready(),
            }
            await introduce(wire, self.token, hello)
            wire.give_up_after(PATIENCE * self.plan.timeouts.heartbeat)
        except BaseException:
            wire.close()
            raise
        return wire

    async def _listen(self) -> None:
        """Opens this node's listeners anew; node 0 also tries the port that torchrun needs next."""
        self._answering.close()
        self._answering = connectivity.Answering(self._key)
        if self.plan.nodes.rank == 0:
            connectivity.try_port(self.plan.network.master_port)
        if self.plan.nodes.count > 1:
            await self._answering.open(
                self.plan.network.address, [self.plan.network.master_port] * (self.plan.nodes.rank == 0)
            )

    def _ready(self) -> dict[str, object]:
        ports = [{"port": port} for port in self._answering.ports]
        return {"ports": ports, "progress": self.around.progress()}

    async def _obey(self, wire: Wire) -> Verdict | None:
        """Does what node 0 says until there is a verdict; None when node 0 is lost and torchrun has ended."""
        self._wire, self._silence, self._heard = wire, "", time.monotonic()
        if self.stops:
            self._tell("stop")
        beating = self._spawn(self._beat(wire))
        try:
            while True:
                message = await wire.receive()
                self._heard = time.monotonic()
                if verdict := self._follow(wire, message):
                    return verdict
        except WireError as error:
            why = f"it does not speak the protocol ({error})"
        except OSError as error:
            why = self._silence or str(error)
        finally:
            self._wire = None
            beating.cancel()
            wire.close()
        if self.stops > 1:
            return STOPPED
        self._abandon(why)
        if self._run:
            await self._run
        return None

    def _tell(self, kind: str, **fields: object) -> None:
        if self._wire:
            self._wire.send(kind, **fields)

    async def _beat(self, wire: Wire) -> None:
        """Gives signs of life, and tries what it can when node 0 gives none, until it counts as lost."""
        beat = self.plan.timeouts.heartbeat / BEATS
        while True:
            wire.send("beat")
            self._tell_stalls(wire)
            await asyncio.sleep(beat)
            silence = time.monotonic() - self._heard
            if silence > self.plan.timeouts.heartbeat:
                self._silence = f"no sign of life for {silence:.0f} s"
                wire.abort()
                return
            if silence > 3 * beat:
                self._spawn(self._pulse(2 * beat))

    def _tell_stalls(self, wire: Wire) -> None:
        """Tells node 0 that all ranks of this node stand still, and where; or that one moves again."""
        # What was seen a moment ago may be of the round before.
        seen = [stall for stall in self.around.stalls() if stall.run_id in ("", self._run_id)]
        stalls = seen[:MOST_RANKS] if self._engine else []
        # A line has room for some 128 collectives.
        most = max(1, min(MOST_ENTERED, 128 // max(1, len(stalls))))
        stalls = [replace(stall, entered=stall.entered[-most:]) for stall in stalls]
        places = [(stall.rank, stall.at, stall.entered) for stall in stalls]
        if places != self._stalled:
            self._stalled = places
            wire.send("stalled", ranks=[asdict(stall) for stall in stalls])

    async def _pulse(self, seconds: float) -> None:
        """Tries a new connection while the old one is silent: after a short cut TCP itself may wait for longer than
        HEARTBEAT_TIMEOUT before it tries again, since it doubles its pauses."""
        with contextlib.suppress(OSError, TimeoutError, WireError):
            async with asyncio.timeout(seconds):
                wire = await self.around.dial()
                try:
                    await introduce(wire, self.token, {"run": self.plan.run_name, "pulse": self.life})
                    await wire.expect("beat")
                    self._heard = time.monotonic()
                finally:
                    wire.close()

    def _follow(self, wire: Wire, message: Message) -> Verdict | None:
        """One message of node 0."""
        kind = message["kind"]
        if kind in ("verdict", "refuse"):
            code = integer(message, "code", 0, 255)
            known = ExitCode(code) if code in {*ExitCode} else ExitCode.FAILED
            return Verdict(code=known, text=text(message, "text", 8000))
        if kind == "news":
            self.around.say(text(message, "text", 8000))
        elif kind == "probe":
            limit = 6 * self.plan.nodes.count
            found = [_target(item) for item in items(message, "targets", limit)]
            self._spawn(self._probe(wire, found))
        elif kind == "go":
            self._go(message)
        elif kind == "halt":
            ending = "; ending the workers of this node" if self._engine else ""
            self.around.say(text(message, "text") + ending)
            self._stopped = self._stopped or message.get("why") == "stop"
            self._end(gently=message.get("why") == "stop", grace=float(integer(message, "grace", 0, 1 << 20)))
        return None

    async def _probe(self, wire: Wire, found: list[connectivity.Target]) -> None:
        failed = await connectivity.dial_all(self.plan.network.address, found)
        told = [{"rank": target.rank, "port": target.port, "why": why} for target, why in failed]
        wire.send("reached", failed=told)

    def _go(self, message: Message) -> None:
        size = integer(message, "nnodes", 1, self.plan.nodes.count)
        place = Place(
            round=integer(message, "round", 1, 1 << 20),
            run_id=text(message, "run_id", 200),
            node_rank=integer(message, "node_rank", 0, size - 1),
            nnodes=size,
        )
        self._answering.close()
        self._round, self._failures = place.round, integer(message, "failures", 0, 1 << 20)
        self._before = self.around.progress()
        self._halted = False
        self._stalled, self._run_id = [], place.run_id
        self.around.state("running", self._round)
        self._engine = self.around.launch(place)
        self._run = self._spawn(self._attend(self._engine))
        self._run.add_done_callback(self._left)

    def _left(self, run: asyncio.Task[None]) -> None:
        """A bug in `_attend` must end this node, not let node 0 wait for its word: `_obey` raises it."""
        if self._wire and not run.cancelled() and run.exception():
            self._wire.abort()

    async def _attend(self, engine: Engine) -> None:
        """One torchrun to its end."""
        try:
            outcome = await engine.watch(self._fails)
        except Exception as error:  # Whatever it said: node 0 waits for this node's end.
            itself = Failure(rank=-1, exitcode=1, text=f"{type(error).__name__}: {error}", time=time.time())
            outcome = Outcome(code=1, failures=(itself,))
        engine.kill()
        self._engine = None
        if left := self.around.clean():
            self.around.say(f"processes that outlived torchrun and were killed: {left}")
        await self.around.look()
        with contextlib.suppress(OSError):
            await self._listen()
        self.around.state("waiting", self._round)
        self._tell("ended", code=_clamp(outcome.code), failures=self._reports(outcome), **self._ready())

    def _fails(self) -> None:
        """A worker ended early: the first sign, long before torchrun says which and why."""
        if not self._halted:
            self._tell("failing")

    def _reports(self, outcome: Outcome) -> list[dict[str, object]]:
        """At most one failure: the first worker's, or torchrun's own."""
        itself = Failure(rank=-1, exitcode=outcome.code, text="", time=time.time())
        first = next(iter(outcome.failures), itself)
        if not outcome.code or (outcome.halted and first is itself):
            return []
        told = {"rank": first.rank, "exitcode": _clamp(first.exitcode), "text": first.text, "time": int(first.time)}
        return [{**told, "halted": outcome.halted}]

    def _end(self, *, gently: bool, grace: float) -> None:
        # Once: a second SIGTERM would cut torchrun's own orderly end short.
        if self._engine and not self._halted:
            self._halted = True
            self.around.state("stopping", self._round)
            self._spawn(self._engine.end(gently=gently, grace=grace))

    def _abandon(self, why: str) -> None:
        """Node 0 is lost: nothing of this round can be saved."""
        self.around.say(f"node 0 ({self.plan.nodes.addresses[0]}) was lost: {why}")
        self._end(gently=False, grace=2.0)
        if self._engine:
            self._failures = 1 if self.around.progress() != self._before else self._failures + 1

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _target(item: Message) -> connectivity.Target:
    return connectivity.Target(
        rank=integer(item, "rank", 0, 1 << 20),
        address=text(item, "address", 64),
        port=integer(item, "port", 1, 65535),
        key=text(item, "key", 64),
    )


def _clamp(code: int) -> int:
    return max(-64, min(255, code))
