"""Which nodes reach each other: what every node dials, and what the coordinator makes of the answers. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from app.gang import probes
from app.gang.messages import Event

ALL_PAIRS = 16
"""Up to so many nodes every pair is tried both ways; above, see `targets`."""
SETTLE = 0.5
"""Seconds until the end of a connection is known: a node that died meanwhile is lost, not firewalled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """A node that cannot connect to another."""

    source: int
    target: int
    why: str
    ports: tuple[int, ...]

    @property
    def connects(self) -> bool:
        """Whether the connection itself works, so that no firewall is in the way."""
        return self.why.startswith("connects")


@dataclass(slots=True, kw_only=True)
class Connectivity:
    """`take` every event until it is `done`, then read `blocked`, `lost` and `pending`. Times are monotonic."""

    ranks: Sequence[int]
    started: float
    known: frozenset[int] = frozenset()
    """Nodes that were tried before and have stayed connected since: among themselves they are not tried again."""
    pending: set[int] = field(default_factory=set)
    """Nodes that have not answered."""
    lost: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Nodes that went away: why, and when that was seen."""
    here: set[int] = field(default_factory=set)
    """Nodes that are still connected at the end."""
    _settled: float = 0.0
    _blocked: dict[tuple[int, int, str], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pending = set(self.ranks)

    @property
    def limit(self) -> float:
        return self.started + 3 * (probes.CONNECT + probes.PASS)

    @property
    def until(self) -> float:
        """When to look again, if no event comes before."""
        return self.limit if self.pending else self._settled

    def peers(self, rank: int) -> list[int]:
        """Whom the node `rank` dials."""
        peers = [self.ranks[other] for other in targets(list(self.ranks).index(rank), len(self.ranks))]
        return [peer for peer in peers if not {rank, peer} <= self.known]

    def ports_of(self, peer: int) -> int:
        """How many of its ports are dialled: on a large cluster one random one each; on node 0 MASTER_PORT is first."""
        most = 1 if len(self.ranks) > ALL_PAIRS else probes.LISTENERS
        return most + 1 if peer == 0 else most

    def take(self, event: Event, now: float) -> None:
        if event.rank not in self.ranks or event.kind not in ("reached", "lost"):
            return
        self.pending.discard(event.rank)
        if event.kind == "lost":
            self.lost[event.rank] = event.why, now
        for peer, port, why in event.blocked:
            self._blocked.setdefault((event.rank, peer, why), []).append(port)
        self._settled = now + SETTLE if self._blocked else now

    def done(self, now: float) -> bool:
        return now >= self.limit if self.pending else now >= self._settled

    @property
    def blocked(self) -> list[Blocked]:
        """Pairs of which both are still here: nobody reaches a node that was lost."""
        found = [
            Blocked(source=source, target=target, why=why, ports=tuple(ports))
            for (source, target, why), ports in self._blocked.items()
        ]
        return [each for each in found if {each.source, each.target} <= self.here]


def targets(index: int, count: int) -> list[int]:
    """Which of `count` nodes the node at `index` dials.

    All others up to ALL_PAIRS nodes. Above that node 0, both neighbours, and those 2, 4, 8... places further on: every
    node dials and is dialled by about log2(count) others, so a node that is cut off is found by all of them and a
    firewall rule that is missing on a node is found by its callers; a fault of one single pair may be missed."""
    if count <= ALL_PAIRS:
        return [other for other in range(count) if other != index]
    strides = [2**power for power in range(count.bit_length()) if 2**power < count]
    return sorted({0, (index - 1) % count, *((index + stride) % count for stride in strides)} - {index})
