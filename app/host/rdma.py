"""RDMA ports of this machine, and what stands between them and NCCL: device nodes, libraries, kernel modules."""

import os
from dataclasses import dataclass
from pathlib import Path

from app.host.files import entries, number, pci_path, text

AMAZON = 0x1D0F
EFA_PLUGIN = (
    "opt/amazon/ofi-nccl/lib*/**/libnccl-net*.so",
    "opt/aws-ofi-nccl/lib/libnccl-net*.so",
    "usr/local/lib/libnccl-net*.so",
)
"""Where AWS's installer and images put aws-ofi-nccl; the plugin's own default is /usr/local."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gid:
    index: int
    text: str
    """As sysfs prints it, eight groups of four digits."""
    kind: str
    """`IB/RoCE v1` or `RoCE v2`; empty on InfiniBand."""
    netdev: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaPort:
    device: str
    port: int
    state: str
    """`ACTIVE`, `DOWN`, `INIT`, `ARMED`."""
    link_layer: str
    """`InfiniBand`, or `Ethernet` (which is RoCE, or iWARP); other cards have `Unknown`."""
    rate: float
    """Gb/s."""
    lid: int = 0
    sm_lid: int = 0
    netdevs: tuple[str, ...] = ()
    gids: tuple[Gid, ...] = ()
    """The slots in use."""
    uverbs: str = ""
    """Name of the device node below /dev/infiniband that NCCL opens for it."""
    openable: bool = False
    """Whether that node exists here and this process may open it."""
    pci: tuple[str, ...] = ()
    management: bool = False
    """The card's own data say that it manages NVLink switches (B200 and later): no traffic goes through it."""

    iwarp: bool = False
    """RDMA over TCP, which NCCL does not know."""
    efa: bool = False
    """Amazon's Elastic Fabric Adapter, which is neither InfiniBand nor RoCE."""

    @property
    def name(self) -> str:
        return f"{self.device}:{self.port}"

    @property
    def for_nccl(self) -> bool:
        """Whether NCCL's own code for RDMA looks at it (net_ib/init.cc)."""
        return self.link_layer in ("InfiniBand", "Ethernet")


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaSoftware:
    dev_infiniband: bool = False
    """Whether /dev/infiniband exists here."""
    library: bool = False
    """libibverbs.so.1, which NCCL loads."""
    providers: tuple[str, ...] = ()
    """Drivers of libibverbs, `mlx5` for instance."""
    efa_plugin: bool = False
    """aws-ofi-nccl, by which NCCL reaches EFA."""


def read_rdma_ports(root: Path) -> tuple[RdmaPort, ...]:
    base = root / "sys/class/infiniband"
    nodes = _uverbs(root)
    return tuple(
        _port(root, base / device, device, port, nodes.get(device, ""))
        for device in entries(base)
        for port in entries(base / device / "ports")
    )


def _uverbs(root: Path) -> dict[str, str]:
    base = root / "sys/class/infiniband_verbs"
    return {text(base / node / "ibdev") or "": node for node in entries(base) if node.startswith("uverbs")}


def _port(root: Path, folder: Path, device: str, port: str, node: str) -> RdmaPort:
    base = folder / "ports" / port
    gids = _gids(base)
    link_layer = text(base / "link_layer") or "Ethernet"
    netdevs = {gid.netdev for gid in gids if gid.netdev} | set(_own_netdevs(folder, int(port), link_layer))
    char = root / "dev/infiniband" / node
    return RdmaPort(
        device=device,
        port=int(port),
        state=(text(base / "state") or "0: UNKNOWN").partition(": ")[2],
        link_layer=link_layer,
        rate=_rate(text(base / "rate")),
        lid=number(base / "lid") or 0,
        sm_lid=number(base / "sm_lid") or 0,
        netdevs=tuple(sorted(netdevs)),
        gids=gids,
        uverbs=node,
        openable=bool(node) and os.access(char, os.R_OK | os.W_OK),
        pci=pci_path(folder / "device"),
        management="SW_MNG" in (text(folder / "device/vpd") or ""),
        iwarp=(text(folder / "node_type") or "").startswith("4:"),
        efa=number(folder / "device/vendor") == AMAZON,
    )


def _rate(content: str | None) -> float:
    try:
        return float((content or "0").split()[0])
    except (ValueError, IndexError):
        return 0.0


def _gids(base: Path) -> tuple[Gid, ...]:
    found = []
    for slot in entries(base / "gids"):
        value = text(base / "gids" / slot)
        if value and value.strip("0:"):
            kind, netdev = (text(base / "gid_attrs" / leaf / slot) or "" for leaf in ("types", "ndevs"))
            found.append(Gid(index=int(slot), text=value, kind=kind, netdev=netdev))
    return tuple(found)


def _own_netdevs(folder: Path, port: int, link_layer: str) -> list[str]:
    # On a function with several ports dev_port, counted from 0, tells which interface belongs to which.
    wanted = 32 if link_layer == "InfiniBand" else 1
    base = folder / "device/net"
    return [
        name
        for name in entries(base)
        if (number(base / name / "dev_port") or 0) == port - 1 and (number(base / name / "type") or 1) == wanted
    ]


def read_rdma_software(root: Path) -> RdmaSoftware:
    """What NCCL needs besides the cards."""
    patterns = ("usr/lib/*-linux-gnu", "usr/lib64", "usr/lib", "lib/*-linux-gnu", "usr/local/lib")
    folders = [folder for pattern in patterns for folder in root.glob(pattern)]
    drivers = {
        file.name.removeprefix("lib").partition("-rdmav")[0]
        for folder in folders
        for file in (folder / "libibverbs").glob("lib*-rdmav*.so")
    }
    return RdmaSoftware(
        dev_infiniband=(root / "dev/infiniband").is_dir(),
        library=any((folder / "libibverbs.so.1").exists() for folder in folders),
        providers=tuple(sorted(drivers)),
        efa_plugin=any(file.exists() for pattern in EFA_PLUGIN for file in root.glob(pattern)),
    )
