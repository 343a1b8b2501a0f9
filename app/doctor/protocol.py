"""What nodes say in doctor, to and from the connection: every field is checked here, once."""

from collections.abc import Sequence

from app.doctor.cluster_checks.transport import Collective, NcclLog
from app.doctor.collect.meter import Peer
from app.doctor.findings import CHECKS, Finding, Row, Severity, to_dict, told
from app.doctor.results import Node
from app.gang.connection import Message, ProtocolError, integer, items, text
from app.gang.messages import Hello

ALL_REDUCE = 45.0
"""Seconds from the start of torchrun, most of which is the import of torch, to its end."""


def read_node(message: Message | None, hello: Hello, address: str) -> Node:
    """A node from its hello and its results; None for one that was lost before it told them. Raises ProtocolError."""
    if message is None:
        message = {"interface": "", "mtu": 0, "speed": 0, "transport": "", "findings": []}
    return Node(
        rank=hello.rank,
        address=address,
        host=hello.host,
        interface=text(message, "interface", 64),
        mtu=integer(message, "mtu", 0, 1 << 20),
        speed=integer(message, "speed", 0, 1 << 30),
        transport=text(message, "transport", 40),
        facts=hello.facts,
        findings=read_findings(message),
    )


def read_meter(message: Message, address: str) -> dict[str, str | int]:
    """Where a node's meter listens, to hand on to others. Raises ProtocolError."""
    ports = {name: integer(message, name, 1, 65535) for name in ("tcp", "udp")}
    return {"address": address, "key": text(message, "key", 64), **ports}


def read_row(message: Message) -> Row:
    """Raises ProtocolError."""
    rank, address = integer(message, "rank", -1, 1 << 16), text(message, "address", 64)
    return Row(rank=rank, address=address, findings=read_findings(message))


def told_row(row: Row) -> dict[str, object]:
    return {"rank": row.rank, "address": row.address, "findings": told_findings(row.findings)}


def read_findings(message: Message) -> tuple[Finding, ...]:
    """Raises ProtocolError for what is not one of our checks and severities."""
    found = []
    for one in items(message, "findings", 200):
        check, severity, values = text(one, "check", 40), text(one, "severity", 20), one.get("values")
        if check not in CHECKS or severity not in {*Severity} or not isinstance(values, dict):
            raise ProtocolError("not a finding")
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
