"""Node 0's part: who is here, do they agree, can they reach each other, and what ends a round.

One coroutine, `Hub.preside`, decides; connections only put what they hear into its inbox.
"""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from app.launch.exitcodes import ExitCode
from app.launch.gang import reach
from app.launch.gang.facts import differences
from app.launch.gang.messages import Event, Hello, Say, read_event, read_hello, read_ports
from app.launch.gang.round import Round, lost
from app.launch.gang.verdict import Final, Trouble, Verdict, account, first_cause
from app.launch.gang.wire import HANDSHAKE, Message, Wire, WireError, challenge, integer, text
from app.launch.plan import Plan

BEATS = 8
"""Heartbeats within HEARTBEAT_TIMEOUT: a link that is cut for 5 s of 8 must not look dead."""
SAY_AFTER, SAY_EVERY = 2.0, 10.0
STRAGGLERS = 2.0
"""Seconds that a disagreement waits for nodes still on their way, so that one table shows all."""
LONGEST_PAUSE = 30.0
LAST_WORD = 2.0
UNPROVEN = 8
"""Connections that one address may have open before it has proven itself."""


@dataclass(slots=True)
class Seat:
    """A node that is connected."""

    wire: Wire
    hello: Hello
    heard: float
    ports: tuple[int, ...]
    progress: str


class Hub:
    """The gang as node 0 sees it. `say` prints on this node's terminal."""

    def __init__(self, plan: Plan, token: bytes, say: Say) -> None:
        self.plan = plan
        self.token = token
        self.say = say
        self.nnodes = len(plan.nodes)
        self.round = 0
        self.failures = 0
        self.seats: dict[int, Seat] = {}
        self._ranks: dict[Wire, int] = {}
        self._uneven = self._attending = False
        self._guests: list[Wire] = []
        self._inbox: asyncio.Queue[tuple[Wire, Hello | Message | str]] = asyncio.Queue(maxsize=1000)
        self._absent: dict[int, str] = {}
        self._said = (0.0, "")
        self._looked = 0.0
        self._grumbled = 0.0
        self._cause = ""
        self._callers: dict[str, int] = {}
        self._verdict: Verdict | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from the handshake to its end."""
        wire = Wire(reader, writer)
        try:
            await self._inbox.put((wire, await self._admit(wire)))
            if self._verdict:
                wire.send("verdict", code=int(self._verdict.code), text=self._verdict.text)
            while True:
                await self._inbox.put((wire, await wire.receive()))
        except (WireError, OSError) as error:
            await self._inbox.put((wire, str(error)))
        except asyncio.CancelledError:
            pass  # the loop ends; Python 3.11's asyncio.streams would print a traceback of its own
        finally:
            wire.close()

    async def _admit(self, wire: Wire) -> Hello:
        callers = self._callers
        if callers.get(wire.peer, 0) >= UNPROVEN or sum(callers.values()) >= 2 * self.nnodes + 64:
            raise WireError("too many connections without a hello")
        callers[wire.peer] = callers.get(wire.peer, 0) + 1
        try:
            async with asyncio.timeout(HANDSHAKE):
                message = await challenge(wire, self.token)
        except TimeoutError:
            raise WireError(f"no hello within {HANDSHAKE:g} s") from None
        finally:
            callers[wire.peer] -= 1
            if not callers[wire.peer]:
                del callers[wire.peer]
        run = text(message, "run", 100)
        if run != self.plan.run_name:
            stranger = f"{self.plan.nodes[0]} port {self.plan.control_port} belongs to another job, run"
            cure = f"{self.plan.run_name!r}; this node's is {run!r}. Set the same RUN_NAME, or another MASTER_PORT."
            wire.send("refuse", code=int(ExitCode.DISAGREE), text=f"{stranger} {cure}")
            raise WireError(f"it belongs to another job, run {run!r}")
        wire.give_up_after(self.plan.heartbeat_timeout)
        # A node with a longer list must get a seat, or its list could not be shown next to ours.
        return read_hello(message, wire.peer, max(self.nnodes, integer(message, "nnodes", 1, 1 << 20)))

    async def preside(self) -> Verdict:
        """Leads the job to its end; returns the verdict that every node was told."""
        beats = asyncio.create_task(self._beat())
        try:
            while True:
                await self._roll_call()
                troubles = await self._prove_reach() or await self._attend()
                await self._weigh(troubles)
        except Final as final:
            self._verdict = verdict = final.verdict
        finally:
            beats.cancel()
        await self._dismiss({*(seat.wire for seat in self.seats.values()), *self._guests}, verdict)
        return verdict

    async def _dismiss(self, wires: set[Wire], verdict: Verdict) -> None:
        """Tells everyone the verdict, and waits a little until they have hung up: then they have read it."""
        for wire in wires:
            wire.send("verdict", code=int(verdict.code), text=verdict.text)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD):
                while wires:
                    wire, said = await self._inbox.get()
                    if isinstance(said, str):
                        wires.discard(wire)

    async def _roll_call(self) -> None:
        """Returns when the nodes of the next round are here and agree; raises Final when they never will."""
        start = time.monotonic()
        until = start + (self.plan.rejoin_timeout if self.round else self.plan.start_timeout)
        knocking = asyncio.create_task(self._knock())
        try:
            while missing := self._missing():
                if time.monotonic() > until:
                    self._without(missing, time.monotonic() - start)
                    break
                self._tell_missing(missing, start, until)
                await self._rest(min(until, time.monotonic() + 0.5))
                if self._differences()[0]:
                    await self._pause(STRAGGLERS)
                    break
        finally:
            knocking.cancel()
        wrong, doubtful = self._differences()
        if wrong:
            raise Final(ExitCode.DISAGREE, f"the nodes do not agree; nothing was started:\n{wrong}")
        if doubtful and self.round == 0:
            self._tell(f"warning: the nodes differ, which may be intended:\n{doubtful}")
        self.round = max(self.round, *(seat.hello.round for seat in self.seats.values()), 0) + 1
        self.failures = max(self.failures, *(seat.hello.failures for seat in self.seats.values()), 0)

    def _missing(self) -> list[int]:
        return [rank for rank in range(self.nnodes) if rank not in self.seats]

    def _differences(self) -> tuple[str, str]:
        return differences({rank: seat.hello.facts for rank, seat in self.seats.items()}) if self._uneven else ("", "")

    def _without(self, missing: Sequence[int], waited: float) -> None:
        if len(self.seats) >= self.plan.min_nodes and 0 in self.seats:
            self._tell(f"going on without {self._list(missing)} (MIN_NODES={self.plan.min_nodes})")
            return
        if self.round:
            told = f"not back within {waited:.0f} s (REJOIN_TIMEOUT): {self._list(missing)}"
            raise Final(ExitCode.LOST, f"{self._cause}; {told}" if self._cause else told)
        raise Final(
            ExitCode.UNREACHABLE,
            f"not here within {waited:.0f} s (START_TIMEOUT): {self._list(missing)}. Start torchrun-compose there; if "
            f"it runs there, let it connect to {self.plan.nodes[0]} port {self.plan.control_port}.",
        )

    def _tell_missing(self, missing: Sequence[int], start: float, until: float) -> None:
        now, who = time.monotonic(), self._list(missing)
        at, what = self._said
        if now > start + SAY_AFTER and (now > at + SAY_EVERY or what != who):
            self._said = (now, who)
            end = time.strftime("%H:%M:%S UTC", time.gmtime(time.time() + until - now))
            here = f"{len(self.seats)} of {self.nnodes} nodes are here; until {end}"
            self._tell(f"waiting {now - start:.0f} s for {who} ({here})")

    async def _knock(self) -> None:
        """Keeps finding out why nodes are missing. Nobody listens there: the kind of refusal is the news."""
        while True:
            await asyncio.sleep(SAY_AFTER / 2)
            missing = [rank for rank in self._missing()[:16] if rank and self.plan.nodes[rank]]
            reasons = await asyncio.gather(*(self._reason(self.plan.nodes[rank]) for rank in missing))
            self._absent.update(zip(missing, reasons, strict=True))

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
        taken, now = self.seats.get(hello.rank), time.monotonic()
        if taken and taken.hello.life != hello.life and now - taken.heard < 3 * self._interval:
            first, second = (f"{self._address(one)} (host {one.host})" for one in (taken.hello, hello))
            cure = "Remove NODE_RANK where it was set by hand, or set it right."
            return self._turn_away(wire, f"two nodes say they are node {hello.rank}: {first} and {second}. {cure}")
        known = {rank: seat.hello.facts for rank, seat in self.seats.items() if rank != hello.rank}
        reference = next(iter(known.values()), hello.facts)
        if hello.facts != reference:
            self._uneven = True
            wrong, _ = differences({**known, hello.rank: hello.facts})
            if self.round and wrong:
                return self._turn_away(wire, f"node {hello.rank} no longer agrees with the others:\n{wrong}")
        else:
            # Equal facts are kept once: 1,000 lists of 1,000 nodes are 20 MB.
            hello = dataclasses.replace(hello, facts=reference)
        if taken:
            taken.wire.close()
        if self._attending:
            wire.send("news", text=f"round {self.round} is running without this node; it joins the next one")
        self._ranks[wire] = hello.rank
        self.seats[hello.rank] = Seat(wire, hello, now, hello.ports, hello.progress)
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
        ranks = sorted(self.seats)
        for index, rank in enumerate(ranks):
            peers = [ranks[other] for other in reach.targets(index, len(ranks))]
            # On a large cluster one random port each, and MASTER_PORT, which comes first on node 0.
            most = 1 if len(ranks) > reach.ALL_PAIRS else reach.LISTENERS
            seats = [(peer, self.seats[peer]) for peer in peers]
            listeners = [(peer, seat, port) for peer, seat in seats for port in seat.ports[: most + (peer == 0)]]
            found = [
                {"rank": peer, "address": self._address(seat.hello), "port": port, "key": seat.hello.key}
                for peer, seat, port in listeners
            ]
            self.seats[rank].wire.send("probe", targets=found)
        waiting, troubles = set(ranks), list[Trouble]()
        blocked: dict[tuple[int, int, str], list[int]] = {}
        until = time.monotonic() + 3 * (reach.CONNECT + reach.PASS)
        while waiting and time.monotonic() < until:
            event = await self._rest(until)
            if event and event.kind in ("reached", "lost"):
                waiting.discard(event.rank)
                troubles += [lost(event, self._name(event.rank), time.monotonic())] * (event.kind == "lost")
                for peer, port, why in event.blocked:
                    blocked.setdefault((event.rank, peer, why), []).append(port)
        if blocked:
            lines = [self._blocked(*pair, ports) for pair, ports in list(blocked.items())[:8]]
            more = f"\n  and {len(blocked) - 8} more" if len(blocked) > 8 else ""
            raise Final(ExitCode.UNREACHABLE, "nodes cannot reach each other:\n" + "\n".join(lines) + more)
        mute = [Trouble(node=self._name(rank), what="was lost: no answer", seen=until) for rank in sorted(waiting)]
        return troubles + mute

    def _blocked(self, rank: int, peer: int, why: str, ports: Sequence[int]) -> str:
        source, target = (self._address(self.seats[one].hello) for one in (rank, peer))
        named = [f"{port} (MASTER_PORT)" if port == self.plan.master_port else str(port) for port in ports]
        rule = f"iptables -I INPUT -p tcp -s {source} -d {target} -j ACCEPT"
        cure = "NCCL and Gloo use random ports, so open all ports between the nodes" if len(named) > 1 else "Open it"
        told = f"  {self._name(rank)} to {self._name(peer)}, port {' and '.join(named)}: {why}"
        return told if why.startswith("connects") else f"{told}. {cure}; on node {peer}: {rule}"

    async def _attend(self) -> list[Trouble]:
        """Runs one round to its end. Returns what went wrong; raises Final when it ended well or was stopped."""
        ranks = sorted(self.seats)
        before = {rank: self.seats[rank].progress for rank in ranks}
        run_id = f"{self.plan.run_name}-{self.round}-{self.seats[ranks[0]].hello.life[:6]}"
        for index, rank in enumerate(ranks):
            place = {"node_rank": index, "nnodes": len(ranks), "failures": self.failures}
            self.seats[rank].wire.send("go", round=self.round, run_id=run_id, **place)
        current = Round(
            names={rank: self._name(rank) for rank in ranks},
            stop_grace=self.plan.stop_grace,
            patience=self.plan.heartbeat_timeout + 10,
            halt=lambda why, grace, reason: self._tell(reason, "halt", why=why, grace=math.ceil(grace)),
        )
        self._attending = True
        while current.running:
            event = await self._hear(current.limit)
            if event:
                current.take(event, time.monotonic())
            elif time.monotonic() >= current.limit:
                for rank in current.running & self.seats.keys():
                    self._unseat(self.seats[rank].wire)
                current.give_up(time.monotonic())
        self._attending = False
        if any(rank in self.seats and self.seats[rank].progress != before[rank] for rank in ranks):
            self.failures = 0
        return current.result()

    async def _weigh(self, troubles: Sequence[Trouble]) -> None:
        """Another round after a pause, or Final."""
        self.failures += 1
        told, most = account(troubles), self.plan.max_restarts
        self._cause = told
        if self.failures > most:
            tries = f". {self.failures} failures in a row without a new checkpoint (MAX_RESTARTS={most})"
            raise Final(first_cause(troubles).code, told + tries * (most > 0))
        pause = min(2.0 ** (self.failures - 1), LONGEST_PAUSE)
        self._tell(f"{told}. All nodes start again in {pause:.0f} s (restart {self.failures} of {most})")
        await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await self._rest(until)

    async def _rest(self, until: float) -> Event | None:
        """Like `_hear`, outside a round: a stop ends the job."""
        event = await self._hear(until)
        if event and event.kind == "stop":
            raise Final(ExitCode.STOPPED, f"stopped on {self._name(event.rank)} before the training was done")
        return event

    async def _hear(self, until: float) -> Event | None:
        """The next event; None after a moment, at `until`, or when what was heard was no event."""
        if silent := self._silent():
            self._unseat(self.seats[silent[0]].wire)
            why = f"no sign of life for {self.plan.heartbeat_timeout:g} s (machine down, or its link is cut)"
            return Event(rank=silent[0], kind="lost", why=why, silent=True)
        try:
            async with asyncio.timeout(max(0.0, min(0.3, until - time.monotonic()))):
                wire, said = await self._inbox.get()
        except TimeoutError:
            return None
        if isinstance(said, Hello):
            return Event(rank=said.rank, kind="joined") if self._seat(wire, said) else None
        rank = self._ranks.get(wire)
        if rank is None:
            if isinstance(said, str):
                self._refused(wire, said)
            return None
        try:
            return self._lose(wire, rank, said) if isinstance(said, str) else self._understand(rank, said)
        except WireError as error:
            return self._lose(wire, rank, f"it said something that is not the protocol ({error})")

    def _refused(self, wire: Wire, why: str) -> None:
        """Logs a connection that came to nothing, once in a while: an attacker must not fill the log."""
        now = time.monotonic()
        if wire.peer and now > self._grumbled + SAY_AFTER:
            self._grumbled = now
            self.say(f"a connection from {wire.peer} was no use: {why}")

    def _understand(self, rank: int, said: Message) -> Event | None:
        seat = self.seats[rank]
        seat.heard = time.monotonic()
        if said["kind"] == "beat":
            return None
        event = read_event(said, rank, self.nnodes)
        if event.kind == "ended":
            seat.ports, seat.progress = read_ports(said), text(said, "progress", 200)
        return event

    def _lose(self, wire: Wire, rank: int, why: str) -> Event:
        self._unseat(wire)
        return Event(rank=rank, kind="lost", why=f"{why} (its container, engine or machine ended)")

    def _unseat(self, wire: Wire) -> None:
        rank = self._ranks.pop(wire)
        if rank in self.seats and self.seats[rank].wire is wire:
            del self.seats[rank]
        wire.close()

    def _silent(self) -> list[int]:
        now = time.monotonic()
        if now < self._looked + 0.25 or not self._inbox.empty():
            return []
        self._looked = now
        return [rank for rank, seat in self.seats.items() if now - seat.heard > self.plan.heartbeat_timeout]

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            for seat in self.seats.values():
                seat.wire.send("beat")

    @property
    def _interval(self) -> float:
        return self.plan.heartbeat_timeout / BEATS

    def _tell(self, what: str, kind: str = "news", **fields: object) -> None:
        for seat in self.seats.values():
            seat.wire.send(kind, text=what, **fields)

    def _address(self, hello: Hello) -> str:
        listed = self.plan.nodes[hello.rank] if hello.rank < self.nnodes else ""
        return hello.address or listed or self.plan.address

    def _name(self, rank: int) -> str:
        seat = self.seats.get(rank)
        listed = self.plan.nodes[rank] if rank < self.nnodes else ""
        address = listed or (self._address(seat.hello) if seat else "")
        return f"node {rank} ({address})" if address else f"node {rank}"

    def _list(self, ranks: Sequence[int]) -> str:
        shown = [f"{self._name(rank)}: {self._absent.get(rank, 'no word yet')}" for rank in ranks[:8]]
        return "; ".join(shown) + (f"; and {len(ranks) - 8} more" if len(ranks) > 8 else "")
