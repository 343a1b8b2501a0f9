"""What was measured, and the definitions of nccl-tests that make the figures comparable.

Bandwidths: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

from collections.abc import Callable
from dataclasses import dataclass

from app.host.links import Link

PROVEN = 625e6
"""Bytes per second that one stream reaches on any machine; no more is asked of a faster link."""
SEVERE = 0.3

Factor = Callable[[int], float]

# Bus bandwidth = algorithm bandwidth times this, for n ranks.
BUS_FACTORS: dict[str, Factor] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "all_to_all": lambda n: (n - 1) / n,
    "send_recv": lambda n: 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One collective at one size."""

    collective: str
    ranks: int
    size: int
    """Bytes, as nccl-tests counts them: the whole array, for all_gather and reduce_scatter over all ranks."""
    seconds: float
    """Mean time of one call on the slowest rank (`-a 3` of nccl-tests)."""
    correct: bool

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes per second."""
        return self.size / self.seconds

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second; comparable with the rate of the link, whatever the number of ranks."""
        return self.algorithm_bandwidth * BUS_FACTORS[self.collective](self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSpeed:
    """One direction between two nodes, by their first ranks."""

    source: int
    """Node rank of the sender."""
    target: int
    bandwidth: float
    """Bytes per second."""
    latency: float
    """Half the shortest round trip of four bytes, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowPart:
    """A node or path that is slow."""

    id: str
    """`slow-node`, `slow-path`: against the others. `below-link`, `all-below-link`: against what the links promise."""
    nodes: tuple[int, ...]
    """Where to look: the node, or source and target of the path; of `all-below-link` the slowest path's come first."""
    way: str = ""
    """Of a node: `sends`, `receives` or `sends and receives`."""
    bandwidth: float
    """Bytes per second."""
    expected: float
    """What others reach, or what the link promises."""
    paths: int = 1
    """How many directions are meant."""

    @property
    def severe(self) -> bool:
        return self.bandwidth < SEVERE * min(self.expected, PROVEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that one run of the bench found, on rank 0."""

    nodes: tuple[str, ...]
    """Address or host name by node rank."""
    ranks: int
    backend: str
    device: str
    links: tuple[Link, ...]
    """By node rank."""
    pairs: tuple[PairSpeed, ...]
    measures: tuple[Measure, ...]
    unsupported: tuple[str, ...]
    """Collectives that this backend does not have."""
    cut_short: tuple[str, ...]
    """Collectives whose largest sizes were left out for want of time or memory."""


def readable_size(size: int) -> str:
    """`size` bytes as nccl users write it: 64 KiB, 1 MiB; odd sizes in bytes."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} B"


def readable_rate(rate: float) -> str:
    """Bytes per second in GB/s, or in MB/s below 0.1 GB/s."""
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e8 else f"{rate / 1e6:.2f} MB/s"
