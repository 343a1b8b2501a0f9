"""Checks of this node's network: interface, name, ports, InfiniBand and RoCE."""

from collections.abc import Iterator, Mapping

from app.doctor.collect.live import LiveFacts
from app.doctor.facts import Facts
from app.doctor.findings import Finding, Value, green, red, skipped, yellow
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
        text = "{nic} runs half duplex: both ends must negotiate, or be set to the same."
        yield red("nic-half-duplex", "network", text, f"sudo ethtool -r {nic.name}", nic=nic.name)
    errors = sum(health.errors.values())
    if errors > max(10, ERROR_SHARE * health.packets):
        text = "{nic} counts errors ({counters} in {packets} packets): cable, transceiver or port."
        counters = ", ".join(f"{name} {count}" for name, count in health.errors.items())
        values: dict[str, Value] = {"nic": nic.name, "counters": counters, "packets": health.packets}
        yield yellow("nic-errors", "network", text, f"ethtool -S {nic.name}", **values)
    if health.flaps > MANY_FLAPS:
        text = "The link of {nic} went down {flaps} times since it was set up."
        yield yellow("nic-flaps", "network", text, f"dmesg | grep {nic.name}", nic=nic.name, flaps=health.flaps)


def check_names(facts: Facts) -> tuple[Finding, ...]:
    """This machine's own name. 127.0.1.1 is harmless here, since the interface is exported, but worth knowing."""
    name = facts.host.hostname
    answer = facts.host.answers.get(name)
    if answer is None:
        return (skipped("names", "the host name was not looked up"),)
    if not answer.addresses:
        # Not 127.0.1.1, as distributions have it: plain Gloo sends the other nodes to whatever the name stands for.
        address = facts.plan.network.address if facts.plan else "ADDRESS"
        which = "" if facts.plan else "   # this machine's address in the nodes' network"
        fix = f"echo '{address} {name}' | sudo tee -a /etc/hosts{which}"
        text = "This machine's name {name} has no address ({failure}): torch looks it up."
        return (yellow("name-without-address", "names", text, fix, name=name, failure=answer.failure),)
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
            text = "{name} {port} is taken on {addresses} by another job or service."
            fix = f"sudo ss -ltnp 'sport = :{port}'   # then stop it, or set another MASTER_PORT on all nodes"
            found.append(
                red("port-taken", "ports", text, fix, name=name, port=port, addresses=" and ".join(sorted(takers)))
            )
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
    chosen = facts.decision("RDMA ports")
    if chosen is None:
        return (skipped("rdma", "{ports} ports, none usable", ports=len(ports)),)
    return (green("rdma", "{ports}: {reason}", ports=chosen.value, reason=chosen.reason),)


def _rdma_health(port: str, live: LiveFacts) -> Iterator[Finding]:
    counts = live.rdma.get(port, {})
    high = {name: counts[name] for name, (limit, _) in RDMA_LIMITS.items() if counts.get(name, 0) >= limit}
    if high:
        text = "{port} counts errors since its driver was loaded: {counters}."
        counters = ", ".join(f"{name} {count} ({RDMA_LIMITS[name][1]})" for name, count in high.items())
        fix = f"ibdiagnet, or watch: grep . /sys/class/infiniband/{port.replace(':', '/ports/')}/*counters/*"
        yield yellow("rdma-errors", "rdma", text, fix, port=port, counters=counters)
