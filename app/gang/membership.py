"""Who is connected to node 0, under which name, and whether they are alive."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from app.gang.agreement import differences
from app.gang.connection import Wire
from app.gang.messages import Hello
from app.plan import Plan

BEATS = 8
"""Heartbeats within HEARTBEAT_TIMEOUT: a link that is cut for 5 s of 8 must not look dead."""


@dataclass(slots=True)
class Seat:
    """A node that is connected."""

    wire: Wire
    hello: Hello
    """As it came; its ports and its progress are those of the newest round."""
    heard: float


class Seats:
    """The nodes that are here, by rank."""

    def __init__(self, plan: Plan) -> None:
        self.absent: dict[int, str] = {}
        """Why a missing node is missing, as far as node 0 could find out."""
        self.disagree = False
        """Somebody came who differs from the others in what must be equal."""
        self._plan = plan
        self._taken: dict[int, Seat] = {}
        self._uneven = False
        self._looked = 0.0

    def __contains__(self, rank: int) -> bool:
        return rank in self._taken

    def __len__(self) -> int:
        return len(self._taken)

    def get(self, rank: int) -> Seat | None:
        return self._taken.get(rank)

    def taken(self) -> dict[int, Seat]:
        """All seats of this moment, in rank order."""
        return dict(sorted(self._taken.items()))

    @property
    def interval(self) -> float:
        """Seconds between two beats."""
        return self._plan.timeouts.heartbeat / BEATS

    def holds(self, seat: Seat) -> bool:
        """Whether the node of `seat` is still here, by the same connection."""
        return self._taken.get(seat.hello.rank) is seat

    def twin(self, hello: Hello) -> Hello | None:
        """The living node that has the rank of `hello` and is another process."""
        taken = self._taken.get(hello.rank)
        if taken and taken.hello.life != hello.life and time.monotonic() - taken.heard < 3 * self.interval:
            return taken.hello
        return None

    def disagreement(self, hello: Hello) -> str:
        """What a newcomer must not differ in from those who are here, as a table, or ""."""
        first = next((seat.hello for rank, seat in self._taken.items() if rank != hello.rank), hello)
        if first.facts == hello.facts:
            return ""
        return differences({first.rank: first.facts, hello.rank: hello.facts})[0]

    def pulse(self, life: str) -> bool:
        """Somebody lives whose connection is stuck; False if nobody here is meant."""
        seat = next((seat for seat in self._taken.values() if seat.hello.life == life), None)
        if seat:
            seat.heard = time.monotonic()
        return seat is not None

    def take(self, wire: Wire, hello: Hello) -> Seat:
        """Gives a node its seat, in place of an older connection of the same node."""
        reference = next((seat.hello.facts for seat in self._taken.values()), hello.facts)
        if hello.facts == reference:
            # Equal facts are kept once: 1,000 lists of 1,000 nodes are 20 MB.
            hello = replace(hello, facts=reference)
        else:
            self._uneven, self.disagree = True, self.disagree or bool(self.disagreement(hello))
        seat = self._taken[hello.rank] = Seat(wire, hello, time.monotonic())
        return seat

    def free(self, seat: Seat) -> bool:
        """Whether the seat was this connection's, and is free now."""
        seat.wire.close()
        return self.holds(seat) and bool(self._taken.pop(seat.hello.rank))

    def differences(self) -> tuple[str, str]:
        """As in `facts.differences`."""
        return differences({rank: seat.hello.facts for rank, seat in self._taken.items()}) if self._uneven else ("", "")

    def missing(self) -> list[int]:
        return [rank for rank in range(self._plan.nodes.count) if rank not in self._taken]

    def silent(self) -> Seat | None:
        """A node that was not heard for HEARTBEAT_TIMEOUT. Looks four times a second, whatever the number of nodes."""
        now = time.monotonic()
        if now < self._looked + 0.25:
            return None
        self._looked = now
        patience = self._plan.timeouts.heartbeat
        return next((seat for seat in self._taken.values() if now - seat.heard > patience), None)

    def tell(self, kind: str, **fields: object) -> None:
        for seat in self._taken.values():
            seat.wire.send(kind, **fields)

    def address(self, hello: Hello) -> str:
        listed = self._plan.nodes.addresses[hello.rank] if hello.rank < self._plan.nodes.count else ""
        return hello.address or listed or self._plan.network.address

    def name(self, rank: int) -> str:
        listed = self._plan.nodes.addresses[rank] if rank < self._plan.nodes.count else ""
        address = listed or (self.address(self._taken[rank].hello) if rank in self._taken else "")
        return f"node {rank} ({address})" if address else f"node {rank}"

    def names(self, ranks: Sequence[int]) -> str:
        """Missing nodes with the reasons."""
        return _few([f"{self.name(rank)}: {self.absent.get(rank, 'no word yet')}" for rank in ranks])

    def some(self, ranks: Collection[int]) -> str:
        return _few([self.name(rank) for rank in sorted(ranks)])


def _few(told: Sequence[str]) -> str:
    return "; ".join(told[:8]) + (f"; and {len(told) - 8} more" if len(told) > 8 else "")
