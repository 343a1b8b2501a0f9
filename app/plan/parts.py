"""The typed parts of a plan: what the other rooms use of what was decided."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class JobNodes:
    """The nodes of the job as this node sees them."""

    rank: int
    """This node's."""
    rank_source: str = "detected"
    """Where it comes from: `detected` by address, or the variable's source."""
    addresses: tuple[str, ...]
    """Literal addresses in rank order; "" where only the roll call can tell (classic variables)."""
    names: tuple[str, ...]
    """The same nodes as the user wrote them."""
    minimum: int
    """The fewest nodes with which a restart may go on."""
    spares: int = 0
    """How many of the nodes wait while the others train."""
    regrow: bool = True
    """A round with too few nodes ends at its next checkpoint when another node has come."""

    @property
    def count(self) -> int:
        return len(self.addresses)

    @property
    def training(self) -> int:
        """How many nodes train."""
        return self.count - self.spares


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How the nodes reach each other."""

    interface: str
    address: str
    """This node's own address, on `interface`."""
    transport: str
    """What NCCL will use between nodes: `InfiniBand`, `RoCE` or `sockets`."""
    rdma_ports: tuple[str, ...] = ()
    """The ports that NCCL will take, as `device:port`."""
    master_addr: str
    master_port: int
    control_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalWorkers:
    """The worker processes of this node."""

    nproc: int
    """For torchrun: always the resolved number, so that all parts count alike."""
    backend: str
    gpus: int
    """GPUs that torch will count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What the workers run, in which environment and folders."""

    command: tuple[str, ...]
    """The script part of torchrun's command."""
    run_dir: Path
    checkpoint_dir: Path
    places: tuple[Path | None, Path | None] = (None, None)
    """Of run_dir and checkpoint_dir on the host, where this is a container and they are folders of it."""
    home: Path | None = None
    """For HOME, where the container's own is in memory."""
    env: Mapping[str, str] = field(repr=False, default_factory=dict)
    """To add to the process environment for torchrun, sorted by name; secrets of the user's included."""
    preload: tuple[str, ...] = ()
    """Modules to load once for all rounds; none: each process loads its own."""
    removed: tuple[str, ...] = ()
    """To take out of the process environment first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointExchange:
    """What of the nodes' checkpoints is exchanged before a round."""

    mirror: bool
    """False: each node has its own."""
    keep: int | None
    """Newest entries of CHECKPOINT_DIR; None for all."""
    limit: int
    """Bytes that one node gets before a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long is waited for what, in seconds."""

    start: float
    rejoin: float
    stop_grace: float
    heartbeat: float
    hang_report: float
    """0: never."""
    hang_timeout: float
    """0: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Monitoring:
    """Who is told of the job."""

    metrics: tuple[str, int] | None = None
    """Address and port for Prometheus."""
    notify: tuple[str, ...] = field(repr=False, default=())
    """Apprise's addresses: secrets."""
