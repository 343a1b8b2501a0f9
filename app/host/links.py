"""What this node's link promises, from sysfs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What the hardware of one node promises."""

    name: str
    """Interface or RDMA devices; empty when unknown."""
    rate: float | None
    """Bytes per second, both ways; None when the kernel does not tell (virtual links)."""


def read_link(environ: Mapping[str, str], *, backend: str, root: Path = Path("/")) -> Link:
    """The RDMA ports that NCCL uses where there are any, else the network interface that the launcher chose.

    Several RDMA ports add up, since NCCL uses all of them. Never raises: a link that does not tell its rate has None.
    """
    if backend == "nccl" and environ.get("NCCL_IB_DISABLE", "0") != "1":
        ports = [(name, rate) for name, rate in _rdma_ports(root) if _chosen(name, environ.get("NCCL_IB_HCA", ""))]
        if ports:
            return Link(name="+".join(name for name, _ in ports), rate=sum(rate for _, rate in ports))
    name = environ.get("GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME", "").lstrip("=")
    name = name.split(",")[0]
    return Link(name=name, rate=_interface_rate(root, name))


def _interface_rate(root: Path, name: str) -> float | None:
    # Mbit/s; -1 or an error for links that have no speed.
    try:
        megabits = int((root / "sys/class/net" / name / "speed").read_text())
    except (OSError, ValueError):
        return None
    return megabits * 1e6 / 8 if megabits > 0 else None


def _rdma_ports(root: Path) -> list[tuple[str, float]]:
    ports = []
    for port in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        try:
            layer = (port / "link_layer").read_text().strip()
            # EFA and others are neither InfiniBand nor RoCE: NCCL does not look at them.
            active = layer in ("InfiniBand", "Ethernet") and (port / "state").read_text().startswith("4:")
            gigabits = float((port / "rate").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            continue
        if active:
            ports.append((f"{port.parts[-3]}:{port.name}", gigabits * 1e9 / 8))
    return ports


def _chosen(port: str, wanted: str) -> bool:
    # The launcher writes the exact form `=dev:port,...`; the other forms of NCCL_IB_HCA are prefixes and exclusions.
    exclude, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    names = [name for name in wanted.lstrip("^=").split(",") if name]
    if not names:
        return True
    hit = any(port == name or port.split(":")[0] == name or (not exact and port.startswith(name)) for name in names)
    return hit != exclude
