"""Who is connected to node 0, under which name, whether they are alive, and why the others are missing."""

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from app.gang.agreement import Facts, differences
from app.gang.connection import Connection, Message
from app.gang.messages import Hello
from app.plan import Plan

MICRO = 1_000_000
BEATS = 8
"""Heartbeats within HEARTBEAT_TIMEOUT: a link that is cut for 5 s of 8 must not look dead."""


@dataclass(slots=True)
class NodeConnection:
    """A node that is connected."""

    connection: Connection
    hello: Hello
    """As it came; its progress is that of the newest round."""
    heard: float
    answers: dict[int, asyncio.Future[Message | None]] = field(default_factory=dict)
    """What it has been asked, by number; None for a node that was lost meanwhile."""
    at: int = 0
    """When its last heartbeat left it, in microseconds of its own clock; 0 for none."""
    trip: float = -1.0
    """Seconds that a heartbeat takes there and back, as the node has measured it; negative until it has."""

    def echo(self, now: float) -> Mapping[str, int]:
        """What the node needs to measure the round trip: its last heartbeat, and for how long it lay here."""
        return {"at": self.at, "held": round((now - self.heard) * MICRO)} if self.at else {}


class Membership:
    """The connected nodes, by rank."""

    def __init__(self, plan: Plan) -> None:
        self.absent: dict[int, str] = {}
        """Why a missing node is missing, as far as node 0 could find out."""
        self.rejected: dict[int, str] = {}
        """Why node 0 closed the last connection from a missing node's address."""
        self.beyond: dict[int, Facts] = {}
        """Facts of nodes with a longer list, for the table: a rank that the list does not have is never a member."""
        self._plan = plan
        self._nodes: dict[int, NodeConnection] = {}
        self._uneven = False
        self._strictly = False

    def __contains__(self, rank: int) -> bool:
        return rank in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, rank: int) -> NodeConnection | None:
        return self._nodes.get(rank)

    def all(self) -> dict[int, NodeConnection]:
        """All nodes of this moment, in rank order."""
        return dict(sorted(self._nodes.items()))

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats."""
        return self._plan.timeouts.heartbeat / BEATS

    def holds(self, node: NodeConnection) -> bool:
        """Whether `node` is still here, by the same connection."""
        return self._nodes.get(node.hello.rank) is node

    def twin(self, hello: Hello) -> Hello | None:
        """The living node that has the rank of `hello` and is another process."""
        known = self._nodes.get(hello.rank)
        if (
            known
            and known.hello.instance_id != hello.instance_id
            and time.monotonic() - known.heard < 3 * self.interval
        ):
            return known.hello
        return None

    def disagreement(self, hello: Hello) -> str:
        """What a newcomer must not differ in from those who are here, as a table, or ""."""
        first = next((node.hello for rank, node in self._nodes.items() if rank != hello.rank), hello)
        if first.facts == hello.facts:
            return ""
        return differences({first.rank: first.facts, hello.rank: hello.facts})[0]

    def pulse(self, instance_id: str) -> bool:
        """A node lives whose connection is stuck; False if none of these is meant."""
        node = next((node for node in self._nodes.values() if node.hello.instance_id == instance_id), None)
        if node:
            node.heard = time.monotonic()
        return node is not None

    def add(self, connection: Connection, hello: Hello) -> NodeConnection:
        """Makes a node a member, in place of an older connection of the same node."""
        reference = next((node.hello.facts for node in self._nodes.values()), hello.facts)
        if hello.facts == reference:
            # Equal facts are kept once: 1,000 lists of 1,000 nodes are 20 MB.
            hello = replace(hello, facts=reference)
        else:
            self._uneven, self._strictly = True, self._strictly or bool(self.disagreement(hello))
        self.rejected.pop(hello.rank, None)
        node = self._nodes[hello.rank] = NodeConnection(connection, hello, time.monotonic())
        return node

    def remove(self, node: NodeConnection) -> bool:
        """Whether the node was a member by this connection, and is none now."""
        node.connection.close()
        for answer in node.answers.values():
            if not answer.done():
                answer.set_result(None)
        return self.holds(node) and bool(self._nodes.pop(node.hello.rank))

    def reject(self, address: str, told: int, why: str) -> int | None:
        """Notes why the connection of a missing node was closed; its rank, as `told` or by its address, if that is
        news."""
        addresses, missing = self._plan.nodes.addresses, self.missing()
        by_address = (rank for rank in missing if address and addresses[rank] == address)
        rank = told if told in missing else next(by_address, None)
        if rank is None or self.rejected.get(rank) == why:
            return None
        self.rejected[rank] = self.absent[rank] = why
        return rank

    def differences(self) -> tuple[str, str]:
        """As in `agreement.differences`."""
        if not self._uneven and not self.beyond:
            return "", ""
        return differences({**self.beyond, **{rank: node.hello.facts for rank, node in self._nodes.items()}})

    def disagrees(self) -> bool:
        """Whether those who are here differ in what must be equal."""
        if self._strictly or self.beyond:
            # Who differed may have left.
            self._strictly = bool(self.differences()[0])
        return self._strictly

    def missing(self) -> list[int]:
        return [rank for rank in range(self._plan.nodes.count) if rank not in self._nodes]

    def silent(self) -> list[NodeConnection]:
        """Nodes that were not heard for HEARTBEAT_TIMEOUT."""
        now, patience = time.monotonic(), self._plan.timeouts.heartbeat
        return [node for node in self._nodes.values() if now - node.heard > patience]

    def broadcast(self, kind: str, **fields: object) -> None:
        for node in self._nodes.values():
            node.connection.send(kind, **fields)

    def address(self, hello: Hello) -> str:
        return hello.address or self._listed(hello.rank) or self._plan.network.address

    def name(self, rank: int) -> str:
        address = self._listed(rank) or (self.address(self._nodes[rank].hello) if rank in self._nodes else "")
        return f"node {rank} ({address})" if address else f"node {rank}"

    def names(self, ranks: Collection[int]) -> str:
        return _few([self.name(rank) for rank in sorted(ranks)])

    def reasons(self, ranks: Sequence[int]) -> str:
        """Missing nodes with the reasons."""
        return _few([f"{self.name(rank)}: {self.absent.get(rank, 'nothing heard from it yet')}" for rank in ranks])

    def _listed(self, rank: int) -> str:
        return self._plan.nodes.addresses[rank] if rank < self._plan.nodes.count else ""


def _few(shown: Sequence[str]) -> str:
    return "; ".join(shown[:8]) + (f"; and {len(shown) - 8} more" if len(shown) > 8 else "")
