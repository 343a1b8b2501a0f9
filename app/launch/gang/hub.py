"""Node 0's part: who is here, do they agree, can they reach each other, and what ends a round.

One coroutine, `Hub.preside`, decides; connections only put what they hear into its inbox.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence

from app.launch.exitcodes import ExitCode
from app.launch.gang import reach
from app.launch.gang.arrival import SAY_AFTER, Waiting
from app.launch.gang.door import Door
from app.launch.gang.messages import Event, Hello, Pulse, Say, read_event, read_ports
from app.launch.gang.round import Round, lost
from app.launch.gang.seats import Seats
from app.launch.gang.verdict import Final, Trouble, Verdict, account, first_cause
from app.launch.gang.wire import Message, Wire, WireError, text
from app.launch.plan import Plan

STRAGGLERS = 2.0
"""Seconds that a disagreement waits for nodes still on their way, so that one table shows all."""
LONGEST_PAUSE = 30.0
"""Seconds before a round; the first restart comes at once, each further one in a row after twice the pause."""
LAST_WORD = 2.0
"""Seconds until everybody has read the verdict."""
LINGER = 10.0
"""Seconds that a job which was refused still tells those who come late: they would wait until START_TIMEOUT."""


class Hub:
    """The gang as node 0 sees it. `say` prints on this node's terminal."""

    def __init__(self, plan: Plan, token: bytes, say: Say) -> None:
        self.plan = plan
        self.say = say
        self.door = Door(plan, token)
        self.seats = Seats(plan)
        self.round = 0
        self.failures = 0
        self._attending = False
        self._guests: list[Wire] = []
        self._grumbled = 0.0
        self._cause = ""
        self._got_on = False
        """The training made progress in some round, so its script and arguments are good."""
        self._concluded: Verdict | None = None

    def conclude(self, verdict: Verdict) -> None:
        """Node 0 itself cannot take part: ends the job for all."""
        self._concluded = verdict

    async def preside(self) -> Verdict:
        """Leads the job to its end; returns the verdict that every node was told."""
        beats = asyncio.create_task(self._beat())
        try:
            while True:
                await self._roll_call()
                troubles = await self._prove_reach() or await self._attend()
                await self._weigh(troubles)
        except Final as final:
            self.door.verdict = verdict = final.verdict
        finally:
            beats.cancel()
        await self._dismiss(self.seats.wires | {*self._guests}, verdict)
        return verdict

    async def _dismiss(self, wires: set[Wire], verdict: Verdict) -> None:
        """Tells everyone the verdict, and waits a little until they have hung up: then they have read it."""
        for wire in wires:
            wire.send("verdict", code=int(verdict.code), text=verdict.text)
        refused = not self.round and verdict.code in (ExitCode.DISAGREE, ExitCode.SETTINGS)
        late = {*self.seats.missing()} - {0} if refused else set[int]()
        if late:
            self.say(f"this node stays for up to {LINGER:.0f} s to tell the end to {self.seats.some(late)}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER if late else LAST_WORD):
                while wires or late:
                    wire, said = await self.door.inbox.get()
                    if isinstance(said, Hello):
                        late.discard(said.rank)
                        wires.add(wire)
                    elif isinstance(said, str):
                        wires.discard(wire)

    async def _roll_call(self) -> None:
        """Returns when the nodes of the next round are here and agree; raises Final when they never will."""
        waiting = Waiting(self.plan.rejoin_timeout if self.round else self.plan.start_timeout, self._tell)
        knocking = asyncio.create_task(self._knock())
        try:
            while missing := self.seats.missing():
                if waiting.over:
                    self._without(missing, waiting.waited)
                    break
                here = f"{len(self.seats)} of {len(self.plan.nodes)} nodes are here"
                waiting.tell(f"{self.seats.names(missing)}; {here}")
                await self._rest(min(waiting.until, time.monotonic() + 0.5))
                if self.seats.differences()[0]:
                    await self._pause(STRAGGLERS)
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
            self.round = max(self.seats[rank].hello.round for rank in self.seats.ranks)
            self.failures = max(self.seats[rank].hello.failures for rank in self.seats.ranks)
        self.round += 1

    def _without(self, missing: Sequence[int], waited: float) -> None:
        if len(self.seats) >= self.plan.min_nodes and 0 in self.seats:
            self._tell(f"going on without {self.seats.names(missing)} (MIN_NODES={self.plan.min_nodes})")
            return
        if self.round:
            told = f"not back within {waited:.0f} s (REJOIN_TIMEOUT): {self.seats.names(missing)}"
            raise Final(ExitCode.LOST, f"{self._cause}; {told}" if self._cause else told)
        raise Final(
            ExitCode.UNREACHABLE,
            f"not here within {waited:.0f} s (START_TIMEOUT): {self.seats.names(missing)}. Start torchrun-compose "
            f"there; if it runs there, let it connect to {self.plan.nodes[0]} port {self.plan.control_port}.",
        )

    async def _knock(self) -> None:
        """Keeps finding out why nodes are missing. Nobody listens there: the kind of refusal is the news."""
        while True:
            await asyncio.sleep(SAY_AFTER / 2)
            missing = [rank for rank in self.seats.missing()[:16] if rank and self.plan.nodes[rank]]
            reasons = await asyncio.gather(*(self._reason(self.plan.nodes[rank]) for rank in missing))
            self.seats.absent.update(zip(missing, reasons, strict=True))

    async def _reason(self, address: str) -> str:
        try:
            async with asyncio.timeout(reach.CONNECT):
                _, writer = await asyncio.open_connection(address, self.plan.control_port)
        except (OSError, TimeoutError) as error:
            alive = " (the machine is up; not started there, or it cannot reach node 0)"
            return reach.why(error) + alive * isinstance(error, ConnectionRefusedError)
        writer.close()
        return "something else listens on its CONTROL_PORT"

    def _seat(self, wire: Wire, hello: Hello) -> bool:
        """Gives a node its seat; False if it was refused. Raises Final when two nodes claim one rank at the start."""
        if twin := self.seats.twin(hello):
            first, second = (f"{self.seats.address(one)} (host {one.host})" for one in (twin, hello))
            cure = "Remove NODE_RANK where it was set by hand, or set it right."
            return self._turn_away(wire, f"two nodes say they are node {hello.rank}: {first} and {second}. {cure}")
        if self.round and (wrong := self.seats.disagreement(hello)):
            return self._turn_away(wire, f"node {hello.rank} no longer agrees with the others:\n{wrong}")
        if self._attending:
            wire.send("news", text=f"round {self.round} is running without this node; it joins the next one")
        self.seats.take(wire, hello)
        return True

    def _turn_away(self, wire: Wire, reason: str) -> bool:
        if not self.round:
            self._guests.append(wire)
            raise Final(ExitCode.DISAGREE, reason)
        wire.send("refuse", code=int(ExitCode.DISAGREE), text=reason)
        self.say(f"refused {wire.peer}: {reason}")
        return False

    async def _prove_reach(self) -> list[Trouble]:
        """Lets every node dial its share of the others. Returns the troubles of nodes lost meanwhile."""
        ranks = self.seats.ranks
        for index, rank in enumerate(ranks):
            peers = [ranks[other] for other in reach.targets(index, len(ranks))]
            # On a large cluster one random port each, and MASTER_PORT, which comes first on node 0.
            most = 1 if len(ranks) > reach.ALL_PAIRS else reach.LISTENERS
            seats = [(peer, self.seats[peer]) for peer in peers]
            listeners = [(peer, seat, port) for peer, seat in seats for port in seat.ports[: most + (peer == 0)]]
            found = [
                {"rank": peer, "address": self.seats.address(seat.hello), "port": port, "key": seat.hello.key}
                for peer, seat, port in listeners
            ]
            self.seats[rank].wire.send("probe", targets=found)
        trying, troubles = set(ranks), list[Trouble]()
        blocked: dict[tuple[int, int, str], list[int]] = {}
        waiting = Waiting(3 * (reach.CONNECT + reach.PASS), self._tell)
        while trying and not waiting.over:
            waiting.tell(f"{self.seats.some(trying)} to try whom it reaches")
            event = await self._rest(waiting.until)
            if event and event.kind in ("reached", "lost"):
                trying.discard(event.rank)
                troubles += [lost(event, self.seats.name(event.rank), time.monotonic())] * (event.kind == "lost")
                for peer, port, why in event.blocked:
                    blocked.setdefault((event.rank, peer, why), []).append(port)
        if blocked:
            lines = [self._blocked(*pair, ports) for pair, ports in list(blocked.items())[:8]]
            more = f"\n  and {len(blocked) - 8} more" if len(blocked) > 8 else ""
            raise Final(ExitCode.UNREACHABLE, "nodes cannot reach each other:\n" + "\n".join(lines) + more)
        mute = [self.seats.name(rank) for rank in sorted(trying)]
        return troubles + [Trouble(node=node, what="was lost: no answer", seen=waiting.until) for node in mute]

    def _blocked(self, rank: int, peer: int, why: str, ports: Sequence[int]) -> str:
        source, target = (self.seats.address(self.seats[one].hello) for one in (rank, peer))
        named = [f"{port} (MASTER_PORT)" if port == self.plan.master_port else str(port) for port in ports]
        rule = reach.let_in(source, target)
        cure = "NCCL and Gloo use random ports, so open all ports between the nodes" if len(named) > 1 else "Open it"
        told = f"  {self.seats.name(rank)} to {self.seats.name(peer)}, port {' and '.join(named)}: {why}"
        return told if why.startswith("connects") else f"{told}. {cure}; on node {peer}: {rule}"

    async def _attend(self) -> list[Trouble]:
        """Runs one round to its end. Returns what went wrong; raises Final when it ended well or was stopped."""
        ranks = self.seats.ranks
        before = {rank: self.seats[rank].progress for rank in ranks}
        run_id = f"{self.plan.run_name}-{self.round}-{self.seats[ranks[0]].hello.life[:6]}"
        for index, rank in enumerate(ranks):
            place = {"node_rank": index, "nnodes": len(ranks), "failures": self.failures}
            self.seats[rank].wire.send("go", round=self.round, run_id=run_id, **place)
        current = Round(
            names={rank: self.seats.name(rank) for rank in ranks},
            stop_grace=self.plan.stop_grace,
            patience=self.plan.heartbeat_timeout + 10,
            hang_timeout=self.plan.hang_timeout,
            tell=self._tell,
            halt=lambda why, grace, reason: self.seats.tell("halt", text=reason, why=why, grace=math.ceil(grace)),
        )
        self._attending, ending = True, Waiting(0.0, self._tell)
        while current.running:
            event = await self._hear(current.limit)
            if event:
                current.take(event, time.monotonic())
            elif time.monotonic() >= current.limit:
                for rank in current.running & {*self.seats.ranks}:
                    self.seats.free(self.seats[rank].wire)
                current.give_up(time.monotonic())
            current.lose_patience(time.monotonic())
            if current.halted_at and current.running:
                if ending.start != current.halted_at:
                    ending = Waiting(current.limit - current.halted_at, self._tell, start=current.halted_at)
                ending.tell(f"{self.seats.some(current.running)} to end")
        self._attending = False
        if any(rank in self.seats and self.seats[rank].progress != before[rank] for rank in ranks):
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
        """The next event; None after a moment, at `until`, or when what was heard was no event."""
        if self._concluded:
            raise Final(self._concluded.code, self._concluded.text)
        if self.door.inbox.empty() and (silent := self.seats.silent()):
            self.seats.free(silent.wire)
            why = f"no sign of life for {self.plan.heartbeat_timeout:g} s (machine down, or its link is cut)"
            return Event(rank=silent.hello.rank, kind="lost", why=why)
        try:
            async with asyncio.timeout(max(0.0, min(0.3, until - time.monotonic()))):
                wire, said = await self.door.inbox.get()
        except TimeoutError:
            return None
        if isinstance(said, Pulse):
            wire.send("beat" if self.seats.pulse(said.life) else "refuse", code=0, text="not seated")
            return None
        if isinstance(said, Hello):
            return Event(rank=said.rank, kind="joined") if self._seat(wire, said) else None
        rank = self.seats.rank(wire)
        if rank is None:
            self._refused(wire, said)
            return None
        if isinstance(said, str):
            return self._lose(wire, rank, f"{said} (its container, engine or machine ended)")
        try:
            return self._understand(wire, rank, said)
        except WireError as error:
            return self._lose(wire, rank, f"it said something that is not the protocol ({error})")

    def _refused(self, wire: Wire, why: object) -> None:
        """Logs a connection that came to nothing, once in a while: an attacker must not fill the log."""
        now = time.monotonic()
        if isinstance(why, str) and wire.peer and now > self._grumbled + SAY_AFTER:
            self._grumbled = now
            self.say(f"a connection from {wire.peer} was no use: {why}")

    def _understand(self, wire: Wire, rank: int, said: Message) -> Event | None:
        if not self.seats.holds(wire, rank):
            return None
        seat = self.seats[rank]
        seat.heard = time.monotonic()
        if said["kind"] == "beat":
            return None
        event = read_event(said, rank, len(self.plan.nodes))
        if event.kind == "ended":
            seat.ports, seat.progress = read_ports(said), text(said, "progress", 200)
        return event

    def _lose(self, wire: Wire, rank: int, why: str) -> Event:
        self.seats.free(wire)
        return Event(rank=rank, kind="lost", why=why)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.seats.interval)
            self.seats.tell("beat")

    def _tell(self, what: str) -> None:
        self.seats.tell("news", text=what)
