"""Node 0's part: who is here, do they agree, can they reach each other, and what ends a round.

One coroutine, `Hub.preside`, decides; each connection gives its node a seat and hands on the events that it hears.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from app.config.exitcodes import ExitCode
from app.gang import connectivity
from app.gang.connect import SAY_AFTER, Waiting
from app.gang.connection import PATIENCE, Message, Wire, WireError, integer, text
from app.gang.handshake import Door
from app.gang.membership import Seat, Seats
from app.gang.messages import Event, Hello, Say, read_event, read_hello, read_ports
from app.gang.round import Round, lost
from app.gang.verdict import Final, Trouble, Verdict, account, first_cause
from app.plan import Plan

STRAGGLERS = 2.0
"""Seconds that a disagreement waits for nodes still on their way, so that one table shows all."""
LONGEST_PAUSE = 30.0
"""Seconds before a round; the first restart comes at once, each further one in a row after twice the pause."""
LAST_WORD = 2.0
"""Seconds until everybody has read the verdict."""
LINGER = 10.0
"""Seconds that a job which was refused still tells those who come late: they would wait until START_TIMEOUT."""
BACKLOG = 1000
"""Events that wait to be judged; while there are more, nobody is listened to."""
SETTLE = 0.5
"""Seconds until the end of a connection is known: a node that died in the reach test is lost, not firewalled."""


class Hub:
    """The gang as node 0 sees it. `say` prints on this node's terminal."""

    def __init__(self, plan: Plan, token: bytes, say: Say) -> None:
        self.plan = plan
        self.say = say
        self.seats = Seats(plan)
        self.round = 0
        self.failures = 0
        self._door = Door(plan, token)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._attending = False
        self._grumbled = 0.0
        self._cause = ""
        self._got_on = False
        """The training made progress in some round, so its script and arguments are good."""
        self._verdict: Verdict | None = None
        self._told = set[int]()
        """Nodes that came after the verdict, and were told it."""

    def conclude(self, verdict: Verdict) -> None:
        """Ends the job for all, if it has not ended yet."""
        self._verdict = self._verdict or verdict

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from the handshake to its end."""
        wire, seat = Wire(reader, writer), None
        try:
            message = await self._door.admit(wire)
            if "pulse" in message:
                # A sign of life by a connection of its own, from a node whose first one is stuck.
                if self.seats.pulse(text(message, "pulse", 64)):
                    wire.send("beat")
                return
            wire.give_up_after(PATIENCE * self.plan.timeouts.heartbeat)
            seat = await self._admit(wire, message)
            while seat:
                said = await wire.receive()
                seat.heard = time.monotonic()
                if said["kind"] != "beat":
                    self._events.put_nowait(self._understand(seat, said))
                while self._events.qsize() > BACKLOG:
                    await asyncio.sleep(SETTLE)
        except WireError as error:
            self._leave(wire, seat, f"it said something that is not the protocol ({error})" if seat else str(error))
        except OSError as error:
            self._leave(wire, seat, f"{error} (its container, engine or machine ended)" if seat else str(error))
        except asyncio.CancelledError:
            pass  # the loop ends; Python 3.11's asyncio.streams would print a traceback of its own
        finally:
            wire.close()

    async def _admit(self, wire: Wire, message: Message) -> Seat | None:
        """Gives a node its seat; None where the job has ended. Raises WireError for one that is refused."""
        # A node with a longer list must get a seat, or its list could not be shown next to ours.
        hello = read_hello(message, wire.peer, max(self.plan.nodes.count, integer(message, "nnodes", 1, 1 << 20)))
        objection = "" if self._verdict else self._objection(hello)
        if objection:
            wire.send("refuse", code=int(ExitCode.DISAGREE), text=objection)
            raise WireError(f"refused: {objection}")
        self._events.put_nowait(Event(rank=hello.rank, kind="joined"))
        if self._verdict:
            wire.send("verdict", code=int(self._verdict.code), text=self._verdict.text)
            self._told.add(hello.rank)
            await wire.closed()
            return None
        if before := self.seats.get(hello.rank):
            self.seats.free(before)
            self._events.put_nowait(Event(rank=hello.rank, kind="lost", why="its connection broke, and it came again"))
        if self._attending:
            wire.send("news", text=f"round {self.round} is running without this node; it joins the next one")
        return self.seats.take(wire, hello)

    def _objection(self, hello: Hello) -> str:
        """Why a node does not get a seat. Two nodes that claim one rank at the start end the job."""
        if twin := self.seats.twin(hello):
            first, second = (f"{self.seats.address(one)} (host {one.host})" for one in (twin, hello))
            cure = "Remove NODE_RANK where it was set by hand, or set it right."
            told = f"two nodes say they are node {hello.rank}: {first} and {second}. {cure}"
            if not self.round:
                self.conclude(Verdict(code=ExitCode.DISAGREE, text=told))
            return told
        if self.round and (wrong := self.seats.disagreement(hello)):
            return f"node {hello.rank} no longer agrees with the others:\n{wrong}"
        return ""

    def _understand(self, seat: Seat, said: Message) -> Event:
        event = read_event(said, seat.hello.rank, self.plan.nodes.count)
        if event.kind == "ended":
            seat.hello = replace(seat.hello, ports=read_ports(said), progress=text(said, "progress", 200))
        return event

    def _leave(self, wire: Wire, seat: Seat | None, why: str) -> None:
        if seat is None:
            self._grumble(wire, why)
        elif self.seats.free(seat):
            self._events.put_nowait(Event(rank=seat.hello.rank, kind="lost", why=why))

    def _grumble(self, wire: Wire, why: str) -> None:
        """Logs a connection that came to nothing, once in a while: an attacker must not fill the log."""
        now = time.monotonic()
        if wire.peer and now > self._grumbled + SAY_AFTER:
            self._grumbled = now
            self.say(f"a connection from {wire.peer} was no use: {why}")

    async def preside(self) -> Verdict:
        """Leads the job to its end; returns the verdict that every node was told."""
        beats = asyncio.create_task(self._beat())
        try:
            while True:
                seats = await self._roll_call()
                troubles = await self._prove_reach(seats) or await self._attend(seats)
                await self._weigh(troubles)
        except Final as final:
            self._verdict = verdict = final.verdict
        finally:
            beats.cancel()
        await self._dismiss(verdict)
        return verdict

    async def _dismiss(self, verdict: Verdict) -> None:
        """Tells everyone the verdict, and waits a little until they have hung up: then they have read it."""
        self.seats.tell("verdict", code=int(verdict.code), text=verdict.text)
        refused = not self.round and verdict.code in (ExitCode.DISAGREE, ExitCode.SETTINGS)
        late = {*self.seats.missing()} - {0} if refused else set[int]()
        if late:
            self.say(f"this node stays for up to {LINGER:.0f} s to tell the end to {self.seats.some(late)}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER if late else LAST_WORD):
                while len(self.seats) or late - self._told:
                    await self._events.get()

    async def _roll_call(self) -> dict[int, Seat]:
        """The nodes of the next round, once they are here and agree; raises Final when they never will."""
        waiting = Waiting(self.plan.timeouts.rejoin if self.round else self.plan.timeouts.start, self._tell)
        knocking = asyncio.create_task(self._knock())
        try:
            while missing := self.seats.missing():
                if waiting.over:
                    self._without(missing, waiting.waited)
                    break
                waiting.tell(self._whom)
                await self._rest(min(waiting.until, time.monotonic() + 0.5))
                if self.seats.disagree:
                    await self._pause(STRAGGLERS)
                    self.seats.disagree = False
                    if self.seats.differences()[0]:
                        break
        finally:
            knocking.cancel()
        wrong, doubtful = self.seats.differences()
        if wrong:
            raise Final(ExitCode.DISAGREE, f"the nodes do not agree; nothing was started:\n{wrong}")
        if doubtful and self.round == 0:
            self._tell(f"warning: the nodes differ, which may be intended:\n{doubtful}")
        if self.round == 0:
            # A node 0 that was started again goes on where the others were.
            self.round = max(seat.hello.round for seat in self.seats.taken().values())
            self.failures = max(seat.hello.failures for seat in self.seats.taken().values())
        self.round += 1
        return self.seats.taken()

    def _whom(self) -> str:
        return f"{self.seats.names(self.seats.missing())}; {len(self.seats)} of {self.plan.nodes.count} nodes are here"

    def _without(self, missing: Sequence[int], waited: float) -> None:
        if len(self.seats) >= self.plan.nodes.minimum and 0 in self.seats:
            self._tell(f"going on without {self.seats.names(missing)} (MIN_NODES={self.plan.nodes.minimum})")
            return
        if self.round:
            told = f"not back within {waited:.0f} s (REJOIN_TIMEOUT): {self.seats.names(missing)}"
            raise Final(ExitCode.LOST, f"{self._cause}; {told}" if self._cause else told)
        raise Final(
            ExitCode.UNREACHABLE,
            f"not here within {waited:.0f} s (START_TIMEOUT): {self.seats.names(missing)}. Start torchrun-compose "
            f"there; if it runs there, let it connect to {self.plan.nodes.addresses[0]} port "
            f"{self.plan.network.control_port}.",
        )

    async def _knock(self) -> None:
        """Keeps finding out why nodes are missing. Nobody listens there: the kind of refusal is the news."""
        while True:
            await asyncio.sleep(SAY_AFTER / 2)
            missing = [rank for rank in self.seats.missing()[:16] if rank and self.plan.nodes.addresses[rank]]
            reasons = await asyncio.gather(*(self._reason(self.plan.nodes.addresses[rank]) for rank in missing))
            self.seats.absent.update(zip(missing, reasons, strict=True))

    async def _reason(self, address: str) -> str:
        try:
            async with asyncio.timeout(connectivity.CONNECT):
                _, writer = await asyncio.open_connection(address, self.plan.network.control_port)
        except (OSError, TimeoutError) as error:
            alive = " (the machine is up; not started there, or it cannot reach node 0)"
            return connectivity.why(error) + alive * isinstance(error, ConnectionRefusedError)
        writer.close()
        return "something else listens on its CONTROL_PORT"

    async def _prove_reach(self, seats: Mapping[int, Seat]) -> list[Trouble]:
        """Lets every node dial its share of the others. Returns the troubles of nodes lost meanwhile."""
        ranks = [*seats]
        for index, rank in enumerate(ranks):
            peers = [ranks[other] for other in connectivity.targets(index, len(ranks))]
            # On a large cluster one random port each, and MASTER_PORT, which comes first on node 0.
            most = 1 if len(ranks) > connectivity.ALL_PAIRS else connectivity.LISTENERS
            found = [
                {"rank": peer, "address": self.seats.address(hello), "port": port, "key": hello.key}
                for peer in peers
                for hello in [seats[peer].hello]
                for port in hello.ports[: most + (peer == 0)]
            ]
            seats[rank].wire.send("probe", targets=found)
        trying, troubles = set(ranks), list[Trouble]()
        blocked: dict[tuple[int, int, str], list[int]] = {}

        def note(event: Event | None) -> None:
            if event and event.kind in ("reached", "lost"):
                trying.discard(event.rank)
                troubles.extend([lost(event, self.seats.name(event.rank), time.monotonic())] * (event.kind == "lost"))
                for peer, port, why in event.blocked:
                    blocked.setdefault((event.rank, peer, why), []).append(port)

        waiting = Waiting(3 * (connectivity.CONNECT + connectivity.PASS), self._tell)
        while trying and not waiting.over:
            waiting.tell(lambda: f"{self.seats.some(trying)} to try whom it reaches")
            note(await self._rest(waiting.until))
        settled = time.monotonic() + SETTLE * bool(blocked)
        while time.monotonic() < settled:
            note(await self._rest(settled))
        mute = [self.seats.name(rank) for rank in sorted(trying)]
        troubles += [
            Trouble(node=one, what="was lost: no answer", seen=waiting.until, code=ExitCode.LOST) for one in mute
        ]
        here = {rank for rank, seat in seats.items() if self.seats.holds(seat)}
        pairs = [self._blocked(seats, *pair, ports) for pair, ports in blocked.items() if {*pair[:2]} <= here]
        if pairs:
            more = f"\n  and {len(pairs) - 8} more" if len(pairs) > 8 else ""
            told = "nodes cannot reach each other:\n" + "\n".join(pairs[:8]) + more
            if self.round == 1:
                raise Final(ExitCode.UNREACHABLE, told)
            # It worked before: a link that is not quite back gets another round.
            return [Trouble(node="the gang:", what=told, seen=time.monotonic(), code=ExitCode.UNREACHABLE), *troubles]
        if self.round == 1 and not troubles and len(ranks) > 1:
            self._tell(f"all {len(ranks)} nodes are here, agree and reach each other")
        return troubles

    def _blocked(self, seats: Mapping[int, Seat], rank: int, peer: int, why: str, ports: Sequence[int]) -> str:
        source, target = (self.seats.address(seats[one].hello) for one in (rank, peer))
        named = [f"{port} (MASTER_PORT)" if port == self.plan.network.master_port else str(port) for port in ports]
        rule = connectivity.let_in(source, target)
        cure = "NCCL and Gloo use random ports, so open all ports between the nodes" if len(named) > 1 else "Open it"
        told = f"  {self.seats.name(rank)} to {self.seats.name(peer)}, port {' and '.join(named)}: {why}"
        return told if why.startswith("connects") else f"{told}. {cure}; on node {peer}: {rule}"

    async def _attend(self, seats: Mapping[int, Seat]) -> list[Trouble]:
        """Runs one round to its end. Returns what went wrong; raises Final when it ended well or was stopped."""
        before = {rank: seat.hello.progress for rank, seat in seats.items()}
        run_id = f"{self.plan.run_name}-{self.round}-{next(iter(seats.values())).hello.life[:6]}"
        for index, seat in enumerate(seats.values()):
            place = {"node_rank": index, "nnodes": len(seats), "failures": self.failures}
            seat.wire.send("go", round=self.round, run_id=run_id, **place)
        current = Round(
            names={rank: self.seats.name(rank) for rank in seats},
            stop_grace=self.plan.timeouts.stop_grace,
            patience=self.plan.timeouts.heartbeat + 10,
            hang_timeout=self.plan.timeouts.hang_timeout,
            tell=self._tell,
            halt=lambda why, grace, reason: self.seats.tell("halt", text=reason, why=why, grace=math.ceil(grace)),
        )
        self._attending, ending = True, Waiting(0.0, self._tell)
        while current.running:
            event = await self._hear(current.limit)
            if event:
                current.take(event, time.monotonic())
            elif time.monotonic() >= current.limit:
                for rank in current.running:
                    self.seats.free(seats[rank])
                current.give_up(time.monotonic())
            current.lose_patience(time.monotonic())
            if current.halted_at and current.running:
                if ending.start != current.halted_at:
                    ending = Waiting(current.limit - current.halted_at, self._tell, start=current.halted_at)
                ending.tell(lambda: f"{self.seats.some(current.running)} to end")
        self._attending = False
        if any(
            before.get(rank, seat.hello.progress) != seat.hello.progress for rank, seat in self.seats.taken().items()
        ):
            self.failures, self._got_on = 0, True
        return current.result()

    async def _weigh(self, troubles: Sequence[Trouble]) -> None:
        """Another round after a pause, or Final."""
        self.failures += 1
        cause, told, most = first_cause(troubles), account(troubles), self.plan.max_restarts
        self._cause = told
        if cause.hopeless and not self._got_on:
            raise Final(cause.code, f"{told}. {cause.hopeless}. Not started again, since it would end the same way.")
        if self.failures > most:
            tries = f". {self.failures} failures in a row without a new checkpoint (MAX_RESTARTS={most})"
            raise Final(cause.code, told + tries * (most > 0))
        pause = min(2.0 ** (self.failures - 2), LONGEST_PAUSE) if self.failures > 1 else 0.0
        when = f" in {pause:.0f} s" if pause else ""
        self._tell(f"{told}. All nodes start again{when} (restart {self.failures} of {most})")
        await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await self._rest(until)

    async def _rest(self, until: float) -> Event | None:
        """Like `_hear`, outside a round: a stop ends the job."""
        event = await self._hear(until)
        if event and event.kind == "stop":
            raise Final(ExitCode.STOPPED, f"stopped on {self.seats.name(event.rank)} before the training was done")
        return event

    async def _hear(self, until: float) -> Event | None:
        """The next event; None after a moment, or at `until`."""
        if self._verdict:
            raise Final(self._verdict.code, self._verdict.text)
        if silent := self.seats.silent():
            self.seats.free(silent)
            why = f"no sign of life for {self.plan.timeouts.heartbeat:g} s (machine down, or its link is cut)"
            return Event(rank=silent.hello.rank, kind="lost", why=why)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(0.3, until - time.monotonic()))):
                return await self._events.get()
        return None

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.seats.interval)
            self.seats.tell("beat")

    def _tell(self, what: str) -> None:
        self.seats.tell("news", text=what)
