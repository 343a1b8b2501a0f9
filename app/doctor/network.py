"""Checks of this node's network: interface, name, ports, InfiniBand and RoCE."""

from collections.abc import Mapping

from app.doctor.facts import Facts
from app.doctor.findings import Finding, Level, green, skipped
from app.doctor.look import Look
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
    found = list[Finding]()
    for each in [nic, *(below for below in facts.host.nics if below.name in nic.lower)]:
        found += _nic_health(each, facts.look)
    return tuple(found) or (green("network", f"{nic.name}: {', '.join(describe(nic, facts.host))}, no errors"),)


def _nic_health(nic: Nic, look: Look) -> list[Finding]:
    health = look.nics.get(nic.name)
    if health is None:
        return []
    found = []
    if health.duplex == "half":
        sentence = f"{nic.name} runs half duplex: both ends must negotiate, or be set to the same."
        found.append(Finding(check="network", level=Level.RED, sentence=sentence, cure=f"sudo ethtool -r {nic.name}"))
    total = sum(health.errors.values())
    if total > max(10, ERROR_SHARE * health.packets):
        counts = ", ".join(f"{name} {count}" for name, count in health.errors.items())
        sentence = f"{nic.name} counts errors ({counts} in {health.packets} packets): cable, transceiver or port."
        found.append(Finding(check="network", level=Level.YELLOW, sentence=sentence, cure=f"ethtool -S {nic.name}"))
    if health.flaps > MANY_FLAPS:
        sentence = f"The link of {nic.name} went down {health.flaps} times since it was set up."
        found.append(Finding(check="network", level=Level.YELLOW, sentence=sentence, cure=f"dmesg | grep {nic.name}"))
    return found


def check_names(facts: Facts) -> tuple[Finding, ...]:
    """This machine's own name. 127.0.1.1 is harmless here, since the interface is exported, but worth knowing."""
    answer = facts.host.answers.get(facts.host.hostname)
    if answer is None:
        return (skipped("names", "the host name was not looked up"),)
    if not answer.addresses:
        sentence = f"This machine's name {facts.host.hostname} has no address ({answer.failure}): torch looks it up."
        # Not 127.0.1.1, as distributions have it: plain Gloo sends the other nodes to whatever the name stands for.
        address = facts.plan.network.address if facts.plan else "ADDRESS"
        which = "" if facts.plan else "   # this machine's address in the nodes' network"
        cure = f"echo '{address} {facts.host.hostname}' | sudo tee -a /etc/hosts{which}"
        return (Finding(check="names", level=Level.YELLOW, sentence=sentence, cure=cure),)
    told = f"{facts.host.hostname} is {', '.join(answer.addresses[:2])}"
    if all(is_loopback(address) for address in answer.addresses):
        told += " on this machine (/etc/hosts): harmless, since GLOO_SOCKET_IFNAME is exported"
    return (green("names", told),)


def check_ports(facts: Facts) -> tuple[Finding, ...]:
    """Node 0 listens on MASTER_PORT and CONTROL_PORT: is anybody else there?"""
    plan = facts.plan
    if not plan:
        return (skipped("ports", "the ports are not decided, see the other findings"),)
    if plan.nodes.rank:
        return (green("ports", f"only node 0 listens on {plan.network.master_port} and {plan.network.control_port}"),)
    wanted = {"MASTER_PORT": plan.network.master_port}
    if plan.nodes.count > 1:
        wanted["CONTROL_PORT"] = plan.network.control_port
    found = []
    for name, port in wanted.items():
        takers = {address for address, taken in facts.look.listening if taken == port}
        if any(_in_the_way(name, taker, plan) for taker in takers):
            sentence = f"{name} {port} is taken on {' and '.join(sorted(takers))} by another job or service."
            cure = f"sudo ss -ltnp 'sport = :{port}'   # then stop it, or set another MASTER_PORT on all nodes"
            found.append(Finding(check="ports", level=Level.RED, sentence=sentence, cure=cure))
    free = " and ".join(str(port) for port in wanted.values())
    return tuple(found) or (green("ports", f"{free} {'are' if len(wanted) > 1 else 'is'} free"),)


def _in_the_way(name: str, taker: str, plan: Plan) -> bool:
    """CONTROL_PORT is listened on at this node's address only; torchrun's store takes MASTER_PORT on all of IPv6 and
    IPv4, or else on all of IPv4 (c10d/TCPStoreLibUvBackend.cpp)."""
    if taker in (plan.network.address, "0.0.0.0", "::"):  # noqa: S104 - compared, not listened on
        return True
    return name == "MASTER_PORT" and (":" not in taker or ":" in plan.network.address)


def check_rdma(facts: Facts) -> tuple[Finding, ...]:
    """Ports for NCCL and their error counters; what keeps NCCL from them is among the plan's warnings."""
    if not facts.host.rdma_ports:
        return (skipped("rdma", "no InfiniBand or RoCE device"),)
    chosen = facts.decision("RDMA ports")
    found = [finding for port in facts.host.rdma_ports for finding in _rdma_health(port.name, facts.look)]
    if found:
        return tuple(found)
    if chosen is None:
        return (skipped("rdma", f"{len(facts.host.rdma_ports)} ports, none usable"),)
    return (green("rdma", f"{chosen.value}: {chosen.reason}"),)


def _rdma_health(port: str, look: Look) -> list[Finding]:
    counts = look.rdma.get(port, {})
    high = [
        f"{name} {counts[name]} ({meaning})"
        for name, (limit, meaning) in RDMA_LIMITS.items()
        if counts.get(name, 0) >= limit
    ]
    if not high:
        return []
    sentence = f"{port} counts errors since its driver was loaded: {', '.join(high)}."
    cure = f"ibdiagnet, or watch: grep . /sys/class/infiniband/{port.replace(':', '/ports/')}/*counters/*"
    return [Finding(check="rdma", level=Level.YELLOW, sentence=sentence, cure=cure)]
