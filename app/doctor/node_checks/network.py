"""Checks of this node's network: interface, name, ports, InfiniBand and RoCE."""

from collections.abc import Iterator, Mapping

from app.config.problems import count
from app.doctor.collect.live import LiveFacts
from app.doctor.facts import Facts
from app.doctor.findings import Finding, green, skipped, wrong
from app.host.addresses import is_loopback
from app.host.nics import Nic
from app.plan import Plan
from app.plan.network import describe

ERROR_SHARE = 1e-6
"""Errors per packet; a sound Ethernet link loses fewer than one frame in 10^8 (bit error rate 10^-12)."""
MANY_FLAPS = 10
RDMA_LIMITS: Mapping[str, tuple[int, str]] = {
    "symbol_error": (100, "bit errors on the cable"),
    "link_error_recovery": (10, "the link had to train anew"),
    "link_downed": (10, "the link went down"),
    "port_rcv_errors": (100, "damaged packets came in"),
    "local_link_integrity_errors": (10, "bit errors on the cable"),
    "local_ack_timeout_err": (100, "packets were not acknowledged: lost on the way, or the peer died"),
    "rx_icrc_encapsulated": (10, "damaged packets came in"),
}
"""Counters of the kernel's RDMA drivers, how many are too many since the driver was loaded, and what they mean."""


def check_network(facts: Facts) -> tuple[Finding, ...]:
    """The interface that this node uses: state, speed, duplex, errors, flaps. The plan warns of one named instead."""
    nic = facts.nic
    if not nic:
        return (skipped("network", "no interface chosen, see the other findings"),)
    parts = [nic, *(below for below in facts.host.nics if below.name in nic.lower)]
    found = tuple(finding for part in parts for finding in _nic_health(part, facts.live))
    description = ", ".join(describe(nic, facts.host))
    return found or (green("network", "{nic}: {description}, no errors", nic=nic.name, description=description),)


def _nic_health(nic: Nic, live: LiveFacts) -> Iterator[Finding]:
    health = live.nics.get(nic.name)
    if health is None:
        return
    if health.duplex == "half":
        yield wrong("nic-half-duplex", nic=nic.name)
    if sum(health.errors.values()) > max(10, ERROR_SHARE * health.packets):
        counters = ", ".join(f"{name} {errors}" for name, errors in health.errors.items())
        yield wrong("nic-errors", nic=nic.name, counters=counters, packets=health.packets)
    if health.flaps > MANY_FLAPS:
        yield wrong("nic-flaps", nic=nic.name, flaps=health.flaps)


def check_names(facts: Facts) -> tuple[Finding, ...]:
    """This machine's own name. 127.0.1.1 is harmless here, since the interface is exported, but worth knowing."""
    name = facts.host.hostname
    answer = facts.host.answers.get(name)
    if answer is None:
        return (skipped("names", "the host name was not looked up"),)
    if not answer.addresses:
        # Not 127.0.1.1, as distributions have it: plain Gloo sends the other nodes to whatever the name stands for.
        address = facts.plan.network.address if facts.plan else "ADDRESS"
        known = facts.plan is not None
        return (wrong("name-without-address", name=name, failure=answer.failure, address=address, known=known),)
    text = "{name} is {addresses}"
    if all(is_loopback(address) for address in answer.addresses):
        text += " on this machine (/etc/hosts): harmless, since GLOO_SOCKET_IFNAME is exported"
    return (green("names", text, name=name, addresses=", ".join(answer.addresses[:2])),)


def check_ports(facts: Facts) -> tuple[Finding, ...]:
    """Node 0 listens on MASTER_PORT and CONTROL_PORT: is anybody else there?"""
    plan = facts.plan
    if not plan:
        return (skipped("ports", "the ports are not decided, see the other findings"),)
    master, control = plan.network.master_port, plan.network.control_port
    if plan.nodes.rank:
        return (green("ports", "only node 0 listens on {master} and {control}", master=master, control=control),)
    wanted = {"MASTER_PORT": master}
    if plan.nodes.count > 1:
        wanted["CONTROL_PORT"] = control
    found = []
    for name, port in wanted.items():
        takers = {address for address, taken in facts.live.listening if taken == port}
        if any(_in_the_way(name, taker, plan) for taker in takers):
            found.append(wrong("port-taken", name=name, port=port, addresses=" and ".join(sorted(takers))))
    text = "{master} and {control} are free" if len(wanted) > 1 else "{master} is free"
    return tuple(found) or (green("ports", text, master=master, control=control),)


def _in_the_way(name: str, taker: str, plan: Plan) -> bool:
    """CONTROL_PORT is listened on at this node's address only; torchrun's store takes MASTER_PORT on all of IPv6 and
    IPv4, or else on all of IPv4 (c10d/TCPStoreLibUvBackend.cpp)."""
    if taker in (plan.network.address, "0.0.0.0", "::"):  # noqa: S104 - compared, not listened on
        return True
    return name == "MASTER_PORT" and (":" not in taker or ":" in plan.network.address)


def check_rdma(facts: Facts) -> tuple[Finding, ...]:
    """Ports for NCCL and their error counters; what keeps NCCL from them is among the plan's warnings."""
    ports = facts.host.rdma_ports
    if not ports:
        return (skipped("rdma", "no InfiniBand or RoCE device"),)
    found = tuple(finding for port in ports for finding in _rdma_health(port.name, facts.live))
    if found:
        return found
    network = facts.plan.network if facts.plan else None
    if network is None or not network.rdma_ports:
        return (skipped("rdma", "{ports}, none in use", ports=count(len(ports), "port")),)
    return (green("rdma", "{ports}: {transport}", ports=",".join(network.rdma_ports), transport=network.transport),)


def _rdma_health(port: str, live: LiveFacts) -> Iterator[Finding]:
    counts = live.rdma.get(port, {})
    high = {name: counts[name] for name, (limit, _) in RDMA_LIMITS.items() if counts.get(name, 0) >= limit}
    if high:
        counters = ", ".join(f"{name} {errors} ({RDMA_LIMITS[name][1]})" for name, errors in high.items())
        yield wrong("rdma-errors", port=port, counters=counters, place=port.replace(":", "/ports/"))
