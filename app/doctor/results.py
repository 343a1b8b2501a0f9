"""What the nodes found out together, as node 0 collects it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from app.doctor.findings import Finding, Severity, worst

Found = Iterator[tuple[int, Finding]]
"""(rank of the node whose row it is, finding)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResults:
    """What a node said of itself when it came."""

    rank: int
    address: str
    host: str
    interface: str
    mtu: int
    """0 if unknown."""
    transport: str
    """What NCCL will use there: InfiniBand, RoCE or sockets."""
    facts: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        return f"node {self.rank} ({self.address})"


@dataclass(slots=True, kw_only=True)
class Measured:
    """All that the nodes found out together; node 0 fills it in."""

    nodes: dict[int, NodeResults] = field(default_factory=dict)
    listed: tuple[str, ...] = ()
    """Addresses in rank order, "" where unknown."""
    missing: dict[int, str] = field(default_factory=dict)
    """Nodes that did not come, and why."""
    lost: dict[int, str] = field(default_factory=dict)
    """Nodes that came and went away before the end."""
    doubles: list[str] = field(default_factory=list)
    """Sentences about ranks that several nodes claim."""
    blocked: dict[tuple[int, int, str], list[int]] = field(default_factory=dict)
    """Ports by (from, to, why)."""
    tried: set[tuple[int, int]] = field(default_factory=set)
    packets: dict[tuple[int, int], str] = field(default_factory=dict)
    """How packets of full size fared, by (from, to)."""
    offsets: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Seconds that a node's clock is ahead of node 0's, and how sure that is."""
    seen: dict[int, frozenset[int]] = field(default_factory=dict)
    """Whose files each node sees in its checkpoint folder."""
    collectives: dict[int, tuple[Finding, ...]] = field(default_factory=dict)
    """What each node found in bench's check."""
    no_collective: str = ""

    @property
    def collective_would_hang(self) -> bool:
        """Nodes are missing or cut off, or torchrun's port is known to be taken."""
        own = [each for node in self.nodes.values() for each in node.findings if each.check == "ports"]
        return bool(self.missing or self.lost or self.blocked or self.doubles) or worst(own) == Severity.RED
