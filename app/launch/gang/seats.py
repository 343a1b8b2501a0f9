"""Who is connected to node 0, under which name, and whether they are alive."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from app.launch.gang.facts import differences
from app.launch.gang.messages import Hello
from app.launch.gang.wire import Wire
from app.launch.plan import Plan

BEATS = 8
"""Heartbeats within HEARTBEAT_TIMEOUT: a link that is cut for 5 s of 8 must not look dead."""


@dataclass(slots=True)
class Seat:
    """A node that is connected."""

    wire: Wire
    hello: Hello
    heard: float
    ports: tuple[int, ...]
    progress: str


class Seats:
    """The nodes that are here, by rank."""

    def __init__(self, plan: Plan) -> None:
        self.absent: dict[int, str] = {}
        """Why a missing node is missing, as far as node 0 could find out."""
        self._plan = plan
        self._taken: dict[int, Seat] = {}
        self._ranks: dict[Wire, int] = {}
        self._uneven = False
        self._looked = 0.0

    def __getitem__(self, rank: int) -> Seat:
        return self._taken[rank]

    def __contains__(self, rank: int) -> bool:
        return rank in self._taken

    def __len__(self) -> int:
        return len(self._taken)

    @property
    def ranks(self) -> list[int]:
        return sorted(self._taken)

    @property
    def wires(self) -> set[Wire]:
        return {seat.wire for seat in self._taken.values()}

    @property
    def interval(self) -> float:
        """Seconds between two beats."""
        return self._plan.heartbeat_timeout / BEATS

    def rank(self, wire: Wire) -> int | None:
        """The rank of whoever has a seat, or had one before it came again by another connection."""
        return self._ranks.get(wire)

    def holds(self, wire: Wire, rank: int) -> bool:
        return rank in self._taken and self._taken[rank].wire is wire

    def twin(self, hello: Hello) -> Hello | None:
        """The living node that has the rank of `hello` and is another process."""
        taken = self._taken.get(hello.rank)
        if taken and taken.hello.life != hello.life and time.monotonic() - taken.heard < 3 * self.interval:
            return taken.hello
        return None

    def disagreement(self, hello: Hello) -> str:
        """What a newcomer must not differ in from those who are here, as a table, or ""."""
        known = {rank: seat.hello.facts for rank, seat in self._taken.items() if rank != hello.rank}
        if not known or next(iter(known.values())) == hello.facts:
            return ""
        return differences({**known, hello.rank: hello.facts})[0]

    def pulse(self, life: str) -> bool:
        """Somebody lives whose connection is stuck; False if nobody here is meant."""
        seat = next((seat for seat in self._taken.values() if seat.hello.life == life), None)
        if seat:
            seat.heard = time.monotonic()
        return seat is not None

    def take(self, wire: Wire, hello: Hello) -> None:
        """Gives a node its seat; an older connection of the same node is closed."""
        reference = next((seat.hello.facts for seat in self._taken.values()), hello.facts)
        if hello.facts == reference:
            # Equal facts are kept once: 1,000 lists of 1,000 nodes are 20 MB.
            hello = replace(hello, facts=reference)
        else:
            self._uneven = True
        if hello.rank in self._taken:
            self._taken[hello.rank].wire.close()
        self._ranks[wire] = hello.rank
        self._taken[hello.rank] = Seat(wire, hello, time.monotonic(), hello.ports, hello.progress)

    def free(self, wire: Wire) -> None:
        rank = self._ranks.pop(wire)
        if self.holds(wire, rank):
            del self._taken[rank]
        wire.close()

    def differences(self) -> tuple[str, str]:
        """As in `facts.differences`."""
        return differences({rank: seat.hello.facts for rank, seat in self._taken.items()}) if self._uneven else ("", "")

    def missing(self) -> list[int]:
        return [rank for rank in range(len(self._plan.nodes)) if rank not in self._taken]

    def silent(self) -> Seat | None:
        """A node that was not heard for HEARTBEAT_TIMEOUT. Looks four times a second, whatever the number of nodes."""
        now = time.monotonic()
        if now < self._looked + 0.25:
            return None
        self._looked = now
        patience = self._plan.heartbeat_timeout
        return next((seat for seat in self._taken.values() if now - seat.heard > patience), None)

    def tell(self, kind: str, **fields: object) -> None:
        for seat in self._taken.values():
            seat.wire.send(kind, **fields)

    def address(self, hello: Hello) -> str:
        listed = self._plan.nodes[hello.rank] if hello.rank < len(self._plan.nodes) else ""
        return hello.address or listed or self._plan.address

    def name(self, rank: int) -> str:
        listed = self._plan.nodes[rank] if rank < len(self._plan.nodes) else ""
        address = listed or (self.address(self._taken[rank].hello) if rank in self._taken else "")
        return f"node {rank} ({address})" if address else f"node {rank}"

    def names(self, ranks: Sequence[int]) -> str:
        """Missing nodes with the reasons."""
        return _few([f"{self.name(rank)}: {self.absent.get(rank, 'no word yet')}" for rank in ranks])

    def some(self, ranks: Collection[int]) -> str:
        return _few([self.name(rank) for rank in sorted(ranks)])


def _few(told: Sequence[str]) -> str:
    return "; ".join(told[:8]) + (f"; and {len(told) - 8} more" if len(told) > 8 else "")
