"""Judgements of the links between nodes: packet size and speed, each finding at the node to look at."""

from collections import Counter
from collections.abc import Mapping

from app.doctor.collect.meter import Speed, headers
from app.doctor.findings import Finding, Severity, Value, green, red, skipped, yellow
from app.doctor.results import Found, Measured
from app.gang.agreement import told_nodes
from app.plan.decisions import count

PROVEN = 5e9
"""Bits per second that one stream of plain sockets reaches on any machine; faster links are `bench`'s business."""
SLOW_YELLOW, SLOW_RED = 0.6, 0.3
"""Shares of what the link promises, or of PROVEN where it promises more."""
OF_ITSELF = 0.4
"""Share of what a machine reaches with itself that it must reach over a fast link: more is a question of its CPUs."""
UNLIKE = 0.5
"""Where no link tells its rate: share of what the better half of all pairs reaches."""
FAR = 0.002
"""Seconds of round trip; a data centre has less than a tenth."""


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


def judge_speed(measured: Measured) -> Found:
    """Slow pairs, at the node most of whose pairs are slow; at both where nothing tells them apart."""
    slow = {pair: level for pair, speed in measured.speeds.items() if (level := slowness(measured, pair, speed))}
    share = Counter(rank for pair in slow for rank in pair)
    for pair, level in slow.items():
        most = max(share[rank] for rank in pair)
        speed = measured.speeds[pair]
        for rank, other in (pair, pair[::-1]):
            if share[rank] == most:
                node = measured.nodes[rank]
                out, back = (speed.out, speed.back) if rank == pair[0] else (speed.back, speed.out)
                link = f" of a link of {node.speed / 1000:g} Gb/s" if node.speed else ""
                text = "With node {peer}: sends {out}, receives {back}{link}; round trip {rtt}."
                fix = f"ethtool {node.interface}; ip -s link show {node.interface}   # speed, duplex, errors"
                values: dict[str, Value] = {
                    "peer": other,
                    "out": _rate(out),
                    "back": _rate(back),
                    "link": link,
                    "rtt": _micros(speed),
                }
                yield rank, Finding(id="pair-slow", check="speed", severity=level, text=text, values=values, fix=fix)
    for pair, speed in measured.speeds.items():
        if speed.rtt > FAR:
            text = "The round trip to node {peer} takes {rtt}: not one network, or a busy machine."
            fix = f"traceroute {measured.nodes[pair[0]].address}"
            yield pair[1], yellow("pair-far", "speed", text, fix, peer=pair[0], rtt=_micros(speed))
    for pair, why in measured.unmeasured.items():
        yield pair[1], skipped("speed", "with node {peer} not measured: {reason}", peer=pair[0], reason=why)
    touched = {rank for pair in slow for rank in pair if share[rank] == max(share[each] for each in pair)}
    for rank in measured.nodes.keys() - touched:
        mine = [speed for pair, speed in measured.speeds.items() if rank in pair]
        if mine:
            least = min(min(speed.out, speed.back) for speed in mine)
            rtt = max(mine, key=lambda speed: speed.rtt)
            text = "at least {rate} with {peers}, round trip {rtt}"
            yield rank, green("speed", text, rate=_rate(least), peers=count(len(mine), "node"), rtt=_micros(rtt))


def slowness(measured: Measured, pair: tuple[int, int], speed: Speed) -> Severity | None:
    """YELLOW or RED for a pair that is slower than its link promises; None otherwise."""
    least = 8 * min(speed.out, speed.back)
    links = [1e6 * measured.nodes[rank].speed for rank in pair if measured.nodes[rank].speed]
    if len(links) == len(pair):
        within = [OF_ITSELF * 8 * speed.own] if speed.own else []
        share = least / min(*links, PROVEN, *within)
        return Severity.RED if share < SLOW_RED else Severity.YELLOW if share < SLOW_YELLOW else None
    rates = sorted(8 * min(each.out, each.back) for each in measured.speeds.values())
    better = rates[len(rates) // 2 :]
    return Severity.YELLOW if len(rates) > 1 and least < UNLIKE * better[len(better) // 2] else None


def _rate(rate: float) -> str:
    return f"{8 * rate / 1e9:.1f} Gb/s" if rate > 12.5e6 else f"{8 * rate / 1e6:.1f} Mb/s"


def _micros(speed: Speed) -> str:
    return f"{speed.rtt * 1e6:.0f} us"
