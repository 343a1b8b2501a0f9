"""Which addresses are this machine's own, and which of them it uses towards the other nodes."""

from dataclasses import dataclass
from itertools import zip_longest

from app.config.table import columns
from app.host import Host
from app.host.addresses import family, is_link_local, is_loopback, parse
from app.host.nics import Nic, routed_by


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """This node's own address, and the interface that carries it."""

    address: str
    interface: str
    reason: str


def local_addresses(host: Host) -> dict[str, Nic]:
    """Addresses that name this machine: not loopback, not link-local IPv6, not those of container networks."""
    return {
        address.text: nic
        for nic in host.nics
        for address in nic.addresses
        if nic.kind not in ("container", "loopback")
        and not is_loopback(address.text)
        and not is_link_local(address.text)
    }


def loopback_interface(host: Host) -> str:
    return next((nic.name for nic in host.nics if nic.kind == "loopback"), "lo")


def own_towards(host: Host, listed: str | None, nodes: tuple[str, ...]) -> Own | None:
    """The own address: the listed one if it is here, else the one in the network of the other nodes.

    None if this machine has no address of their family at all.
    """
    local = local_addresses(host)
    if listed is not None and is_loopback(listed):
        return Own(address=listed, interface=loopback_interface(host), reason=f"{listed} is this machine only")
    if listed is not None and listed in local:
        name = local[listed].name
        return Own(address=listed, interface=name, reason=f"it carries {listed}, this node's address in NODES")
    peers = [parsed for node in nodes if node != listed and (parsed := parse(node)) is not None]
    version = peers[0].version if peers else family(listed or "")
    fitting = {text: nic for text, nic in local.items() if version is None or family(text) == version}
    for peer in peers:
        for text, nic in fitting.items():
            network = next(address.network for address in nic.addresses if address.text == text)
            if peer in network:
                return Own(address=text, interface=nic.name, reason=f"{text} is in the network of {peer}")
    for peer in peers:
        routed = routed_by(host.routes, peer)
        for text, nic in fitting.items():
            if nic.name == routed:
                return Own(address=text, interface=nic.name, reason=f"the route to {peer} leaves through it")
    for text, nic in fitting.items():
        return Own(address=text, interface=nic.name, reason="the first interface with an address")
    return None


def listing(host: Host, nodes: tuple[str, ...]) -> tuple[str, ...]:
    """The nodes and this machine's addresses side by side, as the lines of an indented table."""
    loopback = any(is_loopback(node) for node in nodes)
    mine = [
        f"{nic.name} {address.network if nic.kind == 'loopback' else address.text}"
        + (" (container network, the same on every machine)" if nic.kind == "container" else "")
        for nic in host.nics
        for address in nic.addresses
        if (nic.kind != "loopback" or loopback) and not is_link_local(address.text)
    ] or ["no address at all"]
    listed = [f"{rank} {node}  " for rank, node in enumerate(nodes)]
    rows = [("NODES", "this machine"), *zip_longest(listed, mine, fillvalue="")]
    return tuple(f"    {line}" for line in columns(rows))
