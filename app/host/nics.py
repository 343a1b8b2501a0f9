"""Network interfaces of this machine: addresses, kind, speed, what lies below them; and the routes."""

import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from pathlib import Path

from app.host.addresses import IpAddress, canonical
from app.host.files import entries, number, pci_path, text

CAPTURED = "ip-addr.json"
"""In a made-up root: the output of `ip -j addr`. /sys has no addresses."""

CONTAINER_NAMES = re.compile(
    r"docker|br-[0-9a-f]{12}$|veth|virbr|vnet|cni|cali|cilium|flannel|podman|lxcbr|lxdbr|incusbr|kube-|nodelocaldns"
    r"|weave|vmnet|vboxnet|mpqemubr|crc$|kind"
)
"""Interfaces of container engines and hypervisors. Their addresses (172.17.0.1, 192.168.122.1) are the same on every
machine, so they name none. A bridge that an administrator made (br0, vmbr0) over a real card is not among them."""

HEADER, ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
"""struct nlmsghdr (length, type, flags, sequence, port) and struct rtattr (length, type)."""
RTM_NEWADDR, RTM_GETADDR, NLM_F_REQUEST, NLM_F_DUMP, IFA_ADDRESS, IFA_LOCAL = 20, 22, 0x1, 0x300, 1, 2

KINDS_BY_TYPE = {772: "loopback", 32: "infiniband"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    text: str
    prefix: int

    @property
    def network(self) -> IPv4Network | IPv6Network:
        return ip_interface(f"{self.text}/{self.prefix}").network


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    name: str
    addresses: tuple[Address, ...] = ()
    """In the kernel's order: NCCL and Gloo use the first of a family."""
    kind: str = "ethernet"
    """ethernet, infiniband (IPoIB), loopback, bond, vlan, bridge, tunnel, virtual or container."""
    up: bool = True
    operstate: str = "unknown"
    speed: int | None = None
    """Mb/s; None if the driver does not say (virtual interfaces, links that are down)."""
    mtu: int | None = None
    lower: tuple[str, ...] = ()
    """Interfaces that this one stands on: bond members, the parent of a VLAN, ports of a bridge."""
    pci: tuple[str, ...] = ()
    rdma: tuple[str, ...] = ()
    """RDMA devices of the same PCI function."""
    arp_ignore: int = 0
    """0: it answers for every address of this machine, also for those of other interfaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    interface: str
    network: IPv4Network | IPv6Network
    metric: int


def read_nics(root: Path) -> tuple[Nic, ...]:
    """All interfaces, in the kernel's naming order."""
    found = _captured(root) if root != Path("/") else _live()
    names = sorted({*entries(root / "sys/class/net"), *found} - {"bonding_masters"})
    return tuple(_nic(root, name, found.get(name, ())) for name in names)


def _live() -> dict[str, tuple[Address, ...]]:
    # What `ip addr` asks the kernel, rtnetlink(7). psutil asks the same, and takes longer to load than all that is read
    # here.
    found: dict[str, tuple[Address, ...]] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as kernel:
        kernel.send(HEADER.pack(HEADER.size + 8, RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + bytes(8))
        while answer := kernel.recv(1 << 16):
            for kind, body in _parts(answer, HEADER):
                if kind != RTM_NEWADDR:
                    return found
                # struct ifaddrmsg: family, prefix, flags, scope, index of the interface.
                version, prefix, _, _, index = struct.unpack_from("=BBBBI", body)
                fields = dict(_parts(body[8:], ATTRIBUTE))
                # Through a tunnel IFA_ADDRESS is the other end.
                raw = fields.get(IFA_LOCAL) or fields.get(IFA_ADDRESS)
                # An interface may be gone by now; other families than IP have no text.
                with contextlib.suppress(OSError, ValueError):
                    address = Address(text=canonical(socket.inet_ntop(version, raw or b"")), prefix=prefix)
                    name = socket.if_indextoname(index)
                    found[name] = (*found.get(name, ()), address)
    return found


def _parts(data: bytes, head: struct.Struct) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each message or attribute in `data`: both begin with their length, and fill up to 4 bytes."""
    while len(data) >= head.size:
        length, kind, *_ = head.unpack_from(data)
        yield kind, data[head.size : length]
        data = data[(length + 3) & ~3 :]


def _captured(root: Path) -> dict[str, tuple[Address, ...]]:
    import json

    content = text(root / CAPTURED)
    links = [] if content is None else json.loads(content)
    return {
        link["ifname"]: tuple(
            Address(text=canonical(entry["local"]), prefix=entry["prefixlen"]) for entry in link["addr_info"]
        )
        for link in links
    }


def _nic(root: Path, name: str, addresses: tuple[Address, ...]) -> Nic:
    folder = root / "sys/class/net" / name
    settings = root / "proc/sys/net/ipv4/conf"
    operstate = text(folder / "operstate") or "unknown"
    speed = number(folder / "speed")
    return Nic(
        name=name,
        addresses=addresses,
        kind=_kind(folder, name),
        # Loopback, tunnels and some virtual drivers are "unknown" for ever: only a plain "down" is down.
        up=operstate not in ("down", "lowerlayerdown", "notpresent"),
        operstate=operstate,
        speed=speed if speed is not None and speed > 0 else None,
        mtu=number(folder / "mtu"),
        lower=_lower(folder),
        pci=pci_path(folder / "device"),
        rdma=entries(folder / "device/infiniband"),
        arp_ignore=max(number(settings / part / "arp_ignore") or 0 for part in ("all", name)),
    )


def _kind(folder: Path, name: str) -> str:
    by_type = KINDS_BY_TYPE.get(number(folder / "type") or 1)
    if by_type is not None or name == "lo":
        return by_type or "loopback"
    if CONTAINER_NAMES.match(name):
        return "container"
    device_type = re.search(r"^DEVTYPE=(\w+)", text(folder / "uevent") or "", re.MULTILINE)
    if device_type is not None and device_type[1] in ("bond", "vlan", "bridge", "wireguard", "vxlan"):
        return "tunnel" if device_type[1] in ("wireguard", "vxlan") else device_type[1]
    if (folder / "bonding").is_dir():
        return "bond"
    if (folder / "bridge").is_dir():
        return "bridge"
    if (folder / "tun_flags").exists():
        return "tunnel"
    return "ethernet" if (folder / "device").exists() else "virtual"


def _lower(folder: Path) -> tuple[str, ...]:
    linked = {name.removeprefix("lower_") for name in entries(folder) if name.startswith("lower_")}
    slaves = (text(folder / "bonding/slaves") or "").split()
    return tuple(sorted({*linked, *slaves, *entries(folder / "brif")}))


def read_routes(root: Path) -> tuple[Route, ...]:
    """Unicast routes of the main table, IPv4 and IPv6."""
    four = [_route4(line.split()) for line in (text(root / "proc/net/route") or "").splitlines()[1:]]
    six = [_route6(line.split()) for line in (text(root / "proc/net/ipv6_route") or "").splitlines()]
    return tuple(route for route in [*four, *six] if route is not None)


def _route4(words: list[str]) -> Route | None:
    if len(words) < 8:
        return None
    # The kernel prints the address as the machine's own 32-bit word: bytes in reverse on x86 and arm64.
    base = socket.inet_ntoa(bytes.fromhex(words[1])[::-1])
    prefix = int(words[7], 16).bit_count()
    return Route(interface=words[0], network=ip_network(f"{base}/{prefix}", strict=False), metric=int(words[6]))


def _route6(words: list[str]) -> Route | None:
    if len(words) < 10 or words[9] == "lo" or words[0].startswith(("ff", "fe80")):
        return None
    base = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0]))
    network = ip_network(f"{base}/{int(words[1], 16)}", strict=False)
    return Route(interface=words[9], network=network, metric=int(words[5], 16))


def routed_by(routes: tuple[Route, ...], address: IpAddress) -> str | None:
    """The interface through which this machine reaches `address`: longest prefix, then lowest metric."""
    fitting = [route for route in routes if route.network.version == address.version and address in route.network]
    best = min(fitting, key=lambda route: (-route.network.prefixlen, route.metric), default=None)
    return None if best is None else best.interface
