"""What this node's link promises, from sysfs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.host.files import number
from app.host.nccl_names import matching
from app.host.rdma import read_rdma_ports


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
        ports = {port.name: port for port in read_rdma_ports(root) if port.for_nccl and port.state == "ACTIVE"}
        chosen = matching(environ.get("NCCL_IB_HCA", ""), list(ports))
        if chosen:
            return Link(name="+".join(chosen), rate=sum(ports[name].rate for name in chosen) * 1e9 / 8)
    name = environ.get("GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME", "").lstrip("=")
    name = name.split(",")[0]
    # Mb/s; -1 or an error for links that have no speed.
    megabits = number(root / "sys/class/net" / name / "speed") or 0
    return Link(name=name, rate=megabits * 1e6 / 8 if megabits > 0 else None)
