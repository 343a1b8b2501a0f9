"""What nodes say in doctor, to and from the connection: every field is checked here, once."""

from collections.abc import Sequence

from app.doctor.collect.packets import Peer
from app.doctor.findings import CHECKS, Finding, Row, Severity, from_sentence, to_dict
from app.doctor.results import NodeResults
from app.gang.connection import Message, ProtocolError, integer, items, text
from app.gang.messages import Hello

COLLECTIVE = 75.0
"""Seconds from the start of torchrun to its end: import of torch, up to 15 steps of pairs, the all-reduces."""


def read_node(message: Message | None, hello: Hello, address: str) -> NodeResults:
    """A node from its hello and its results; None for one that was lost before it told them. Raises ProtocolError."""
    if message is None:
        message = {"interface": "", "mtu": 0, "transport": "", "findings": []}
    return NodeResults(
        rank=hello.rank,
        address=address,
        host=hello.host,
        interface=text(message, "interface", 64),
        mtu=integer(message, "mtu", 0, 1 << 20),
        transport=text(message, "transport", 40),
        facts=hello.facts,
        findings=read_findings(message),
    )


def read_row(message: Message) -> Row:
    """Raises ProtocolError."""
    rank, address = integer(message, "rank", -1, 1 << 16), text(message, "address", 64)
    return Row(rank=rank, address=address, findings=read_findings(message))


def row_fields(row: Row) -> dict[str, object]:
    return {"rank": row.rank, "address": row.address, "findings": finding_fields(row.findings)}


def read_findings(message: Message) -> tuple[Finding, ...]:
    """Raises ProtocolError for what is not one of our checks and severities."""
    found = []
    for one in items(message, "findings", 200):
        check, severity, values = text(one, "check", 40), text(one, "severity", 20), one.get("values")
        if check not in CHECKS or severity not in {*Severity} or not isinstance(values, dict):
            raise ProtocolError("not a finding")
        sentence, fix = text(one, "sentence", 2000), text(one, "fix", 500)
        found.append(from_sentence(text(one, "id", 60), check, Severity(severity), sentence, fix, values))
    return tuple(found)


def finding_fields(findings: Sequence[Finding]) -> list[dict[str, object]]:
    return [to_dict(finding) for finding in findings]


def read_outcomes(message: Message) -> list[tuple[int, str]]:
    """What came of the packets to each peer, by its rank. Raises ProtocolError."""
    return [(integer(one, "rank", 0, 1 << 16), text(one, "outcome", 20)) for one in items(message, "outcomes", 1 << 10)]


def read_seen(message: Message) -> tuple[int, frozenset[int]]:
    """Whether a node could look (1), and whose files it saw. Raises ProtocolError."""
    looked = integer(message, "looked", 0, 1)
    seen = items(message, "seen", 1 << 14) if looked else ()
    return looked, frozenset(integer(one, "rank", 0, 1 << 20) for one in seen)


def read_peer(message: Message, address: str = "") -> Peer:
    """Where a node echoes packets, at `address` if it is known. Raises ProtocolError."""
    return Peer(
        address=address or text(message, "address", 64),
        port=integer(message, "port", 1, 65535),
        key=text(message, "key", 64),
    )


def read_peers(message: Message) -> dict[int, Peer]:
    """By rank. Raises ProtocolError."""
    return {integer(one, "rank", 0, 1 << 16): read_peer(one) for one in items(message, "peers", 1 << 10)}


def peer_fields(rank: int, peer: Peer) -> dict[str, object]:
    return {"rank": rank, "address": peer.address, "port": peer.port, "key": peer.key}
