"""What only several nodes know together: pure judgements of what they measured, each finding at the node to look at."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from app.doctor.findings import Finding, Level, Row, green, skipped
from app.doctor.meter import Speed
from app.doctor.transport import Collective, judge_transport
from app.launch.gang.facts import differences

Found = Iterator[tuple[int, Finding]]
"""(rank of the node whose row it is, finding)"""

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
CLOCKS_APART = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a node said of itself when it came."""

    rank: int
    address: str
    host: str
    interface: str
    mtu: int
    """0 if unknown, as `speed`."""
    speed: int
    """Mb/s of its interface."""
    transport: str
    """What NCCL will use there: InfiniBand, RoCE or sockets."""
    facts: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        return f"node {self.rank} ({self.address})"


@dataclass(slots=True, kw_only=True)
class Measured:
    """All that the nodes found out together; node 0 fills it in."""

    nodes: dict[int, Node] = field(default_factory=dict)
    listed: tuple[str, ...] = ()
    """Addresses in rank order, "" where unknown."""
    missing: dict[int, str] = field(default_factory=dict)
    """Nodes that did not come, and why."""
    lost: dict[int, str] = field(default_factory=dict)
    """Nodes that came and went away before the end."""
    doubles: list[str] = field(default_factory=list)
    """Sentences about ranks that several nodes claim."""
    blocked: dict[tuple[int, int, str], list[int]] = field(default_factory=dict)
    """Ports by (from, to, why)."""
    tried: set[tuple[int, int]] = field(default_factory=set)
    speeds: dict[tuple[int, int], Speed] = field(default_factory=dict)
    packets: dict[tuple[int, int], str] = field(default_factory=dict)
    """How packets of full size fared, by (from, to)."""
    unmeasured: dict[tuple[int, int], str] = field(default_factory=dict)
    offsets: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Seconds that a node's clock is ahead of node 0's, and how sure that is."""
    seen: dict[int, frozenset[int]] = field(default_factory=dict)
    """Whose files each node sees in its checkpoint folder."""
    collectives: dict[int, Collective] = field(default_factory=dict)
    no_collective: str = ""


def judge(measured: Measured) -> tuple[Row, ...]:
    """The table of all nodes, those that never came included."""
    found: dict[int, list[Finding]] = {rank: list(node.findings) for rank, node in measured.nodes.items()}
    for rank in (*measured.missing, *measured.lost):
        found.setdefault(rank, [])
    for judgement in JUDGEMENTS:
        for rank, finding in judgement(measured):
            found[rank].append(finding)
    return tuple(
        Row(rank=rank, address=_address(measured, rank), findings=tuple(findings))
        for rank, findings in sorted(found.items())
    )


def _address(measured: Measured, rank: int) -> str:
    if rank in measured.nodes:
        return measured.nodes[rank].address
    return measured.listed[rank] if rank < len(measured.listed) else ""


def judge_met(measured: Measured) -> Found:
    for rank, why in measured.missing.items():
        cure = "docker compose run --rm trainer doctor   # on that node"
        yield rank, Finding(check="met", level=Level.RED, sentence=f"This node never came: {why}.", cure=cure)
    for rank, node in measured.nodes.items():
        if rank in measured.lost:
            sentence = f"This node came and went away again: {measured.lost[rank]}."
            yield rank, Finding(check="met", level=Level.RED, sentence=sentence)
        else:
            yield rank, green("met", f"host {node.host}")
    for sentence in measured.doubles:
        yield min(measured.nodes), Finding(check="rank", level=Level.RED, sentence=sentence)


def judge_agree(measured: Measured) -> Found:
    """Facts that differ, at the nodes that differ from most of the others (on a tie from node 0)."""
    if len(measured.nodes) < 2:
        return
    wrong_at: set[int] = set()
    for name in sorted({name for node in measured.nodes.values() for name in node.facts} - {"mtu"}):
        values = {rank: node.facts.get(name, "-") for rank, node in measured.nodes.items()}
        if len({*values.values()}) == 1:
            continue
        wrong, doubtful = differences({rank: {name: value} for rank, value in values.items()})
        first, *rest = (line.strip() for line in (wrong or doubtful).splitlines())
        finding = Finding(
            check="agree",
            level=Level.RED if wrong else Level.YELLOW,
            sentence=f"Nodes differ: {' '.join(first.split())}",
            cure=" ".join(rest) or "set it the same on all nodes, or use the same image",
        )
        counts = Counter(values.values())
        usual = max(values.values(), key=lambda value: counts[value])
        for rank in values:
            if values[rank] != usual:
                wrong_at.add(rank)
                yield rank, finding
    for rank in measured.nodes.keys() - wrong_at:
        yield rank, green("agree", f"{len(measured.nodes[rank].facts)} settings and versions as on most nodes")


def judge_reach(measured: Measured) -> Found:
    """Connections that fail, at the node that does not let them in."""
    bad: set[int] = set()
    for (source, target, why), ports in measured.blocked.items():
        caller, called = measured.nodes[source], measured.nodes[target]
        bad.add(target)
        told = " and ".join(map(str, sorted(ports)))
        sentence = f"{caller.name} cannot connect to it, port {told}: {why}."
        if len(ports) > 1:
            sentence += " NCCL and Gloo use random ports: open all between the nodes."
        cure = f"sudo iptables -I INPUT -p tcp -s {caller.address} -d {called.address} -j ACCEPT"
        full_size = why.startswith("connects")
        yield (
            target,
            Finding(
                check="reach",
                level=Level.RED,
                sentence=sentence,
                cure=f"ip link show {called.interface}   # on both nodes" if full_size else cure,
            ),
        )
    for rank in measured.nodes.keys() - bad - measured.lost.keys():
        callers = sorted(source for source, target in measured.tried if target == rank)
        if callers:
            yield rank, green("reach", f"nodes {', '.join(map(str, callers))} connect to it on random ports")
        else:
            yield rank, skipped("reach", "no other node is here")


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
            others = ", ".join(str(other) for other, theirs in sizes.items() if theirs == usual)
            rdma = node.transport == "RoCE"
            what = "RoCE fails between them." if rdma else "TCP adapts; RoCE and UDP lose packets."
            yield (
                rank,
                Finding(
                    check="mtu",
                    level=Level.RED if rdma else Level.YELLOW,
                    sentence=f"{node.interface} has MTU {size}, but {usual} on node {others}. {what}",
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
            cure = f"ping -M do -s {size - 28} {measured.nodes[target].address}   # on node {source}"
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
            yield rank, green("speed", f"at least {_rate(least)} with {len(mine)} nodes, round trip {_micros(rtt)}")


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


def judge_clock(measured: Measured) -> Found:
    for rank, (offset, doubt) in measured.offsets.items():
        if abs(offset) - doubt > CLOCKS_APART:
            ahead = "ahead of" if offset > 0 else "behind"
            sentence = f"Its clock is {abs(offset):.0f} s {ahead} node 0's: logs and file times will mislead."
            cure = "timedatectl; sudo systemctl restart chronyd   # or systemd-timesyncd"
            yield rank, Finding(check="clock", level=Level.YELLOW, sentence=sentence, cure=cure)


def judge_shared(measured: Measured) -> Found:
    """Is the checkpoint folder one for all nodes, one for each, or a mixture (which is never meant)?"""
    seen = measured.seen
    if len(seen) < 2:
        return
    everyone = frozenset(seen)
    if all(others == everyone for others in seen.values()):
        yield from ((rank, green("shared", "one checkpoint folder for all nodes")) for rank in seen)
    elif all(others == {rank} for rank, others in seen.items()):
        told = "each node has its own checkpoint folder; sharded checkpoints (FSDP, DCP) need one for all"
        yield from ((rank, green("shared", told)) for rank in seen)
    else:
        for rank, others in seen.items():
            if others == {rank}:
                sharers = sorted(other for other in seen if len(seen[other]) > 1)
                sentence = f"Its checkpoint folder is its own, while nodes {_list(sharers)} share one."
            else:
                sentence = f"Its checkpoint folder holds the files of nodes {_list(sorted(others))} only."
            cure = "mount the same shared folder on all nodes (RUNS or CHECKPOINT_DIR), or on none"
            yield rank, Finding(check="shared", level=Level.RED, sentence=sentence, cure=cure)


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def judge_collective(measured: Measured) -> Found:
    for rank, collective in measured.collectives.items():
        if rank in measured.nodes:
            yield rank, judge_transport(collective)
    if measured.no_collective:
        for rank in measured.nodes.keys() - measured.collectives.keys():
            yield rank, skipped("all-reduce", measured.no_collective)


JUDGEMENTS = (
    judge_met,
    judge_agree,
    judge_reach,
    judge_mtu,
    judge_speed,
    judge_clock,
    judge_shared,
    judge_collective,
)
