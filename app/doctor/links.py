"""Judgements of the links between nodes: packet size and speed, each finding at the node to look at."""

from collections import Counter

from app.doctor.findings import Finding, Level, green, skipped
from app.doctor.measured import Found, Measured
from app.doctor.meter import Speed, headers
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
    counts = Counter(sizes.values())
    usual = max(sizes.values(), key=lambda size: (counts[size], size))
    bad: set[int] = set()
    for rank, size in sizes.items():
        node = measured.nodes[rank]
        if size != usual:
            bad.add(rank)
            others = told_nodes([other for other, theirs in sizes.items() if theirs == usual])
            rdma = node.transport == "RoCE"
            what = "RoCE fails between them." if rdma else "TCP adapts; RoCE and UDP lose packets."
            yield (
                rank,
                Finding(
                    check="mtu",
                    level=Level.RED if rdma else Level.YELLOW,
                    sentence=f"{node.interface} has MTU {size}, but {usual} on {others}. {what}",
                    cure=f"sudo ip link set {node.interface} mtu {usual}   # or the smaller one on all nodes",
                ),
            )
    for (source, target), outcome in measured.packets.items():
        if outcome == "lost":
            bad.add(target)
            size = min(sizes.get(source, 0), sizes.get(target, 0))
            sentence = (
                f"Packets of {size} bytes from {measured.nodes[source].name} are lost on the way, small ones pass: a "
                "switch or tunnel between them has a smaller MTU."
            )
            address = measured.nodes[target].address
            cure = f"ping -M do -s {size - headers(address)} {address}   # on node {source}"
            yield target, Finding(check="mtu", level=Level.RED, sentence=sentence, cure=cure)
    for rank in measured.nodes.keys() - bad:
        outcomes = {outcome for (_, target), outcome in measured.packets.items() if target == rank}
        if "passes" in outcomes:
            yield rank, green("mtu", f"{sizes.get(rank)}, packets of full size arrive")
        else:
            yield rank, skipped("mtu", "full-size packets not tried: no UDP between the nodes")


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
                sentence = (
                    f"With node {other}: sends {_rate(out)}, receives {_rate(back)}{link}; round trip {_micros(speed)}."
                )
                cure = f"ethtool {node.interface}; ip -s link show {node.interface}   # speed, duplex, errors"
                yield rank, Finding(check="speed", level=level, sentence=sentence, cure=cure)
    for pair, speed in measured.speeds.items():
        if speed.rtt > FAR:
            sentence = f"The round trip to node {pair[0]} takes {_micros(speed)}: not one network, or a busy machine."
            cure = f"traceroute {measured.nodes[pair[0]].address}"
            yield pair[1], Finding(check="speed", level=Level.YELLOW, sentence=sentence, cure=cure)
    for pair, why in measured.unmeasured.items():
        yield pair[1], skipped("speed", f"with node {pair[0]} not measured: {why}")
    touched = {rank for pair in slow for rank in pair if share[rank] == max(share[each] for each in pair)}
    for rank in measured.nodes.keys() - touched:
        mine = [speed for pair, speed in measured.speeds.items() if rank in pair]
        if mine:
            least = min(min(speed.out, speed.back) for speed in mine)
            rtt = max(mine, key=lambda speed: speed.rtt)
            yield (
                rank,
                green("speed", f"at least {_rate(least)} with {count(len(mine), 'node')}, round trip {_micros(rtt)}"),
            )


def slowness(measured: Measured, pair: tuple[int, int], speed: Speed) -> Level | None:
    """YELLOW or RED for a pair that is slower than its link promises; None otherwise."""
    least = 8 * min(speed.out, speed.back)
    links = [1e6 * measured.nodes[rank].speed for rank in pair if measured.nodes[rank].speed]
    if len(links) == len(pair):
        within = [OF_ITSELF * 8 * speed.own] if speed.own else []
        share = least / min(*links, PROVEN, *within)
        return Level.RED if share < SLOW_RED else Level.YELLOW if share < SLOW_YELLOW else None
    rates = sorted(8 * min(each.out, each.back) for each in measured.speeds.values())
    better = rates[len(rates) // 2 :]
    return Level.YELLOW if len(rates) > 1 and least < UNLIKE * better[len(better) // 2] else None


def _rate(rate: float) -> str:
    return f"{8 * rate / 1e9:.1f} Gb/s" if rate > 12.5e6 else f"{8 * rate / 1e6:.1f} Mb/s"


def _micros(speed: Speed) -> str:
    return f"{speed.rtt * 1e6:.0f} us"
