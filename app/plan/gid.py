"""The RoCE address (GID) that NCCL will pick on each port: reported, never pinned."""

from collections.abc import Sequence
from ipaddress import IPv4Network

from app.host import Host
from app.host.addresses import IpAddress, parse
from app.host.nics import Nic
from app.host.rdma import Gid, RdmaPort
from app.plan.decisions import Ledger
from app.plan.exports import Exports
from app.plan.local import Own

STEERING = ("NCCL_IB_GID_INDEX", "NCCL_IB_ADDR_FAMILY", "NCCL_IB_ADDR_RANGE", "NCCL_IB_ROCE_VERSION_NUM")
"""Variables by which users choose a GID themselves."""


def decide_gid(host: Host, own: Own, ports: Sequence[RdmaPort], ledger: Ledger, exports: Exports) -> None:
    """Reports the pick; narrows it only where NCCL's own would be of another network or family."""
    # NCCL then goes by what the user set, which `explain` shows as such.
    steered = any(exports.settings.is_set(name) for name in STEERING)
    network, version = _network(host, own), 4
    if not any(picked(port) for port in ports) and any(picked(port, version=6) for port in ports):
        exports.offer("rdma", "NCCL_IB_ADDR_FAMILY", "AF_INET6", "the RoCE ports have IPv6 addresses only")
        version = 6
    elif not steered and network is not None and _other_network(ports, network):
        why = f"the port has several addresses, and {own.address} is not its first"
        exports.offer("rdma", "NCCL_IB_ADDR_RANGE", network, why)
        return
    if not steered:
        _report(ports, version, ledger)


def picked(port: RdmaPort, version: int = 4) -> Gid | None:
    """NCCL's choice since 2.21: the first RoCE v2 entry of the family (net_ib/connect.cc)."""
    for gid in port.gids:
        address = parse(gid.text)
        if gid.kind == "RoCE v2" and address is not None and address.version == version and not address.is_link_local:
            return gid
    return None


def _report(ports: Sequence[RdmaPort], version: int, ledger: Ledger) -> None:
    picks = [(port, picked(port, version)) for port in ports]
    shown = ", ".join(f"{port.name} index {gid.index} = {parse(gid.text)}" for port, gid in picks if gid is not None)
    if shown:
        why = "what NCCL picks by itself; indexes differ between machines"
        ledger.decide("rdma", "RoCE GID", shown, "detected", why)
    for port, gid in picks:
        if gid is None:
            ledger.warn("rdma.no-roce-v2", port=port.name)


def _network(host: Host, own: Own) -> IPv4Network | None:
    nic: Nic | None = next((each for each in host.nics if each.name == own.interface), None)
    for address in nic.addresses if nic else ():
        if address.text == own.address and isinstance(address.network, IPv4Network):
            return address.network
    return None


def _other_network(ports: Sequence[RdmaPort], network: IPv4Network) -> bool:
    """Whether every port has an address in the network, and NCCL's pick on one of them is outside."""

    def inside(gid: Gid | None) -> bool:
        address: IpAddress | None = parse(gid.text) if gid is not None else None
        return address is not None and address in network

    everywhere = all(any(inside(gid) for gid in port.gids if gid.kind == "RoCE v2") for port in ports)
    return everywhere and not all(inside(picked(port)) for port in ports)
