"""What nodes say at the meeting, to and from the wire: every field is checked here, once."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.doctor.cluster_checks.transport import Collective, NcclLog
from app.doctor.collect.meter import Peer
from app.doctor.findings import CHECKS, Finding, Severity, to_dict, told
from app.doctor.results import Node
from app.gang.connection import Message, Wire, WireError, integer, items, text

LONGEST_FACT = 20_000
"""As long as the list of packages may be (`app.host`); a line of the wire has room for it. A list that is cut
at different places on two nodes would differ in packages that do not."""


@dataclass(slots=True, kw_only=True)
class Seat:
    """A node that is connected."""

    wire: Wire
    node: Node
    life: str
    ports: tuple[int, ...]
    key: str
    meter: Mapping[str, str | int]
    """Fields of meter.Peer, to hand on."""
    inbox: asyncio.Queue[Message | str] = field(default_factory=asyncio.Queue)
    """What it said, or why it is gone."""


def read_seat(wire: Wire, message: Message) -> Seat:
    """Raises WireError."""
    node = Node(
        rank=integer(message, "rank", 0, 1 << 16),
        # Where the connection came from, which nobody can make up; node 0 itself comes by a pair of sockets.
        address=wire.peer or text(message, "address", 64),
        host=text(message, "host", 120),
        interface=text(message, "interface", 64),
        mtu=integer(message, "mtu", 0, 1 << 20),
        speed=integer(message, "speed", 0, 1 << 30),
        transport=text(message, "transport", 40),
        facts=read_facts(message),
        findings=read_findings(message),
    )
    ports = {name: integer(message, name, 1, 65535) for name in ("tcp", "udp")}
    return Seat(
        wire=wire,
        node=node,
        life=text(message, "life", 64),
        ports=tuple(integer(one, "port", 1, 65535) for one in items(message, "ports", 4)),
        key=text(message, "key", 64),
        meter={"address": node.address, "key": text(message, "meter_key", 64), **ports},
    )


def read_facts(message: Message) -> dict[str, str]:
    """Raises WireError."""
    told = message.get("facts")
    if not isinstance(told, dict) or len(told) > 200:
        raise WireError("facts is not an object")
    return {str(name)[:100]: text(told, name, LONGEST_FACT) for name in told}


def told_facts(facts: Mapping[str, str]) -> dict[str, str]:
    return {name: value[:LONGEST_FACT] for name, value in facts.items()}


def read_findings(message: Message) -> tuple[Finding, ...]:
    """Raises WireError for what is not one of our checks and severities."""
    found = []
    for one in items(message, "findings", 200):
        check, severity, values = text(one, "check", 40), text(one, "severity", 20), one.get("values")
        if check not in CHECKS or severity not in {*Severity} or not isinstance(values, dict):
            raise WireError("not a finding")
        sentence, fix = text(one, "sentence", 2000), text(one, "fix", 500)
        found.append(told(text(one, "id", 60), check, Severity(severity), sentence, fix, values))
    return tuple(found)


def told_findings(findings: Sequence[Finding]) -> list[dict[str, object]]:
    return [to_dict(finding) for finding in findings]


def read_collective(message: Message) -> Collective:
    names = [text(one, "name", 100) for one in items(message, "devices", 64)]
    log = NcclLog(
        network=text(message, "network", 60),
        devices=tuple(names),
        inside=tuple(text(one, "name", 20) for one in items(message, "inside", 4)),
        channels=integer(message, "channels", 0, 1 << 20),
        direct=integer(message, "direct", 0, 1 << 20),
        version=text(message, "version", 40),
    )
    return Collective(
        failure=text(message, "failure", 1000),
        backend=text(message, "backend", 20),
        ranks=integer(message, "ranks", 0, 1 << 20),
        alone=bool(integer(message, "alone", 0, 1)),
        bus_bandwidth=float(integer(message, "bandwidth", 0, 1 << 50)),
        interface=text(message, "interface", 64),
        carrier=text(message, "carrier", 64),
        transport=text(message, "transport", 40),
        expects_direct=bool(integer(message, "expects_direct", 0, 1)),
        active_ports=integer(message, "active_ports", 0, 1 << 10),
        log=log,
    )


def told_collective(found: Collective) -> dict[str, object]:
    log = found.log
    return {
        "failure": found.failure,
        "backend": found.backend,
        "ranks": found.ranks,
        "alone": int(found.alone),
        "bandwidth": round(found.bus_bandwidth),
        "interface": found.interface,
        "carrier": found.carrier,
        "transport": found.transport,
        "expects_direct": int(found.expects_direct),
        "active_ports": found.active_ports,
        "network": log.network,
        "devices": [{"name": name} for name in log.devices[:64]],
        "inside": [{"name": name} for name in log.inside],
        "channels": log.channels,
        "direct": log.direct,
        "version": log.version,
    }


def read_peer(message: Message) -> Peer:
    return Peer(
        address=text(message, "address", 64),
        tcp=integer(message, "tcp", 1, 65535),
        udp=integer(message, "udp", 1, 65535),
        key=text(message, "key", 64),
    )
