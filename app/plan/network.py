"""The interface for NCCL and Gloo: the owner of this node's listed address, in each library's own syntax."""

from app.host import Host
from app.host.addresses import family
from app.host.nics import Nic
from app.plan.decisions import Ledger
from app.plan.exports import Exports
from app.plan.local import Own
from app.plan.resource_checks import check_interface, speed_of


def decide_interface(own: Own, host: Host, ledger: Ledger, exports: Exports) -> None:
    """NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, and what is odd about the interface."""
    nic = next((each for each in host.nics if each.name == own.interface), None)
    facts = "" if nic is None else f" ({', '.join(describe(nic, host))})"
    rejected = _rejected(host, own.interface)
    ledger.decide("network", "interface", own.interface, "detected", f"{own.reason}{facts}", rejected)
    ledger.decide("network", "address", own.address, "detected", f"this node's address on {own.interface}")
    exact = "= makes NCCL take exactly this name, not a prefix"
    exports.offer("network", "NCCL_SOCKET_IFNAME", f"={own.interface}", exact)
    exports.offer("network", "GLOO_SOCKET_IFNAME", own.interface, "Gloo takes plain names only")
    check_interface(host, own, ledger)
    if nic is not None and family(own.address) == 6 and any(family(each.text) == 4 for each in nic.addresses):
        why = f"NODES are IPv6, and {own.interface} also has IPv4 addresses"
        exports.offer("network", "NCCL_SOCKET_FAMILY", "AF_INET6", why)


def describe(nic: Nic, host: Host) -> list[str]:
    """What is known of an interface, in a few words each."""
    facts = [nic.kind if not nic.lower else f"{nic.kind} over {'+'.join(nic.lower)}"]
    speed = speed_of(nic, host)
    if speed is not None:
        facts.append(f"{speed / 1000:g} Gb/s")
    if nic.mtu is not None:
        facts.append(f"MTU {nic.mtu}")
    return [*facts, nic.operstate if nic.operstate != "unknown" else "up"]


def _rejected(host: Host, chosen: str) -> tuple[str, ...]:
    """The other interfaces, those with the same reason together: a Docker host may have dozens of bridges."""
    by_reason: dict[str, list[str]] = {}
    for nic in host.nics:
        if nic.name != chosen and nic.kind != "loopback":
            by_reason.setdefault(_why_not(nic), []).append(nic.name)
    return tuple(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def _why_not(nic: Nic) -> str:
    if nic.kind == "container":
        return "container networks have the same addresses on every machine"
    addresses = ", ".join(address.text for address in nic.addresses)
    state = "" if nic.up else f"; it is {nic.operstate}"
    if not addresses:
        return f"no address{state}"
    return f"{addresses} is not this node's address in NODES{state}"
