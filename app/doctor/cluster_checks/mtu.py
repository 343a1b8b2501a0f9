"""Judgement of packet sizes: interfaces with another MTU than most, paths on which packets of full size are lost."""

from collections import Counter
from collections.abc import Mapping

from app.doctor.collect.packets import headers
from app.doctor.findings import Severity, Value, green, skipped, wrong
from app.doctor.results import Found, Measured
from app.gang.agreement import told_nodes


def judge_mtu(measured: Measured) -> Found:
    """Interfaces with a smaller MTU than most, and paths on which packets of full size are lost."""
    sizes = {rank: node.mtu for rank, node in measured.nodes.items() if node.mtu}
    if len(sizes) < 2 or len(measured.nodes) < 2:
        yield from ((rank, skipped("mtu", "no pair to compare")) for rank in measured.nodes)
        return
    bad: set[int] = set()
    for rank, finding in (*_odd_mtus(measured, sizes), *_lost_packets(measured, sizes)):
        bad.add(rank)
        yield rank, finding
    for rank in measured.nodes.keys() - bad:
        outcomes = {outcome for (_, target), outcome in measured.packets.items() if target == rank}
        if "passes" in outcomes:
            yield rank, green("mtu", "{mtu}, packets of full size arrive", mtu=sizes.get(rank, 0))
        else:
            yield rank, skipped("mtu", "full-size packets not tried: no UDP between the nodes")


def _odd_mtus(measured: Measured, sizes: Mapping[int, int]) -> Found:
    counts = Counter(sizes.values())
    usual = max(sizes.values(), key=lambda size: (counts[size], size))
    others = told_nodes([rank for rank, size in sizes.items() if size == usual])
    for rank, size in sizes.items():
        node = measured.nodes[rank]
        rdma = node.transport == "RoCE"
        level = Severity.RED if rdma else Severity.YELLOW
        if size != usual:
            values: dict[str, Value] = {"mtu": size, "usual": usual, "others": others, "rdma": rdma}
            yield rank, wrong("mtu-differs", level, interface=node.interface, **values)


def _lost_packets(measured: Measured, sizes: Mapping[int, int]) -> Found:
    for (source, target), outcome in measured.packets.items():
        if outcome == "lost":
            size = min(sizes.get(source, 0), sizes.get(target, 0))
            address, peer = measured.nodes[target].address, measured.nodes[source].name
            payload = size - headers(address)
            yield target, wrong("path-mtu", size=size, peer=peer, payload=payload, address=address, source=source)
