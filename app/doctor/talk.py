"""What nodes say at the meeting, to and from the wire: every field is checked here, once."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.doctor.collect.packets import Peer
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
    echo: Peer
    """Where it echoes packets."""
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
        transport=text(message, "transport", 40),
        facts=read_facts(message),
        findings=read_findings(message),
    )
    return Seat(
        wire=wire,
        node=node,
        life=text(message, "life", 64),
        ports=tuple(integer(one, "port", 1, 65535) for one in items(message, "ports", 4)),
        key=text(message, "key", 64),
        echo=Peer(
            address=node.address, port=integer(message, "echo_port", 1, 65535), key=text(message, "echo_key", 64)
        ),
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


def read_peers(message: Message) -> dict[int, Peer]:
    """Where the peers echo packets, by rank. Raises WireError."""
    return {
        integer(one, "rank", 0, 1 << 16): Peer(
            address=text(one, "address", 64), port=integer(one, "port", 1, 65535), key=text(one, "key", 64)
        )
        for one in items(message, "peers", 1 << 10)
    }


def told_peer(rank: int, peer: Peer) -> dict[str, object]:
    return {"rank": rank, "address": peer.address, "port": peer.port, "key": peer.key}
