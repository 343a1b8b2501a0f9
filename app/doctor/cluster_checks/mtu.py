"""Judgement of packet sizes: interfaces with another MTU than most, paths on which packets of full size are lost."""

from collections import Counter
from collections.abc import Mapping

from app.doctor.collect.packets import headers
from app.doctor.findings import Finding, Severity, green, red, skipped
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
        if size != usual:
            yield (
                rank,
                Finding(
                    id="mtu-differs",
                    check="mtu",
                    severity=Severity.RED if rdma else Severity.YELLOW,
                    text="{interface} has MTU {mtu}, but {usual} on {others}. {consequence}",
                    values={
                        "interface": node.interface,
                        "mtu": size,
                        "usual": usual,
                        "others": others,
                        "consequence": "RoCE fails between them." if rdma else "TCP adapts; RoCE and UDP lose packets.",
                    },
                    fix=f"sudo ip link set {node.interface} mtu {usual}   # or the smaller one on all nodes",
                ),
            )


def _lost_packets(measured: Measured, sizes: Mapping[int, int]) -> Found:
    for (source, target), outcome in measured.packets.items():
        if outcome == "lost":
            size = min(sizes.get(source, 0), sizes.get(target, 0))
            text = (
                "Packets of {size} bytes from {peer} are lost on the way, small ones pass: a switch or tunnel between "
                "them has a smaller MTU."
            )
            address = measured.nodes[target].address
            fix = f"ping -M do -s {size - headers(address)} {address}   # on node {source}"
            yield target, red("path-mtu", "mtu", text, fix, size=size, peer=measured.nodes[source].name)
