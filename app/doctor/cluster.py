"""What only several nodes know together: pure judgements of what they measured, each finding at the node to look at."""

from collections import Counter

from app.doctor.findings import Finding, Level, Row, green, skipped
from app.doctor.links import judge_mtu, judge_speed
from app.doctor.measured import Found, Measured
from app.doctor.transport import judge_transport
from app.gang.agreement import differences, told_nodes
from app.gang.connectivity import let_in

CLOCKS_APART = 2.0


def judge(measured: Measured) -> tuple[Row, ...]:
    """The table of all nodes, those that never came included."""
    found: dict[int, list[Finding]] = {rank: list(node.findings) for rank, node in measured.nodes.items()}
    for rank in (*measured.missing, *measured.lost):
        found.setdefault(rank, [])
    for judgement in JUDGEMENTS if len(measured.listed) > 1 else (judge_collective,):
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


def judge_present(measured: Measured) -> Found:
    for rank, why in measured.missing.items():
        cure = "docker compose run --rm trainer doctor   # on that node"
        yield rank, Finding(check="present", level=Level.RED, sentence=f"This node never came: {why}.", cure=cure)
    for rank, node in measured.nodes.items():
        if rank in measured.lost:
            sentence = f"This node came and went away again: {measured.lost[rank]}."
            yield rank, Finding(check="present", level=Level.RED, sentence=sentence)
        else:
            yield rank, green("present", f"host {node.host}")
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
        lines = [" ".join(line.split()) for line in (wrong or doubtful).splitlines()]
        told = [line for line in lines if line.startswith(("package ", "and "))] or lines[:1]
        finding = Finding(
            check="agree",
            level=Level.RED if wrong else Level.YELLOW,
            sentence=f"Nodes differ: {'; '.join(told)}",
            cure=" ".join(lines[len(told) :]) or "set it the same on all nodes, or use the same image",
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
        cure = let_in(caller.address, called.address)
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
            verb = "connects" if len(callers) == 1 else "connect"
            yield rank, green("reach", f"{told_nodes(callers)} {verb} to it on random ports")
        else:
            yield rank, skipped("reach", "no other node is here")


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
                sentence = f"Its checkpoint folder is its own, while {told_nodes(sharers)} share one."
            else:
                sentence = f"Its checkpoint folder holds the files of {told_nodes(sorted(others))} only."
            cure = "mount the same shared folder on all nodes (RUNS or CHECKPOINT_DIR), or on none"
            yield rank, Finding(check="shared", level=Level.RED, sentence=sentence, cure=cure)


def judge_collective(measured: Measured) -> Found:
    for rank, collective in measured.collectives.items():
        if rank in measured.nodes:
            yield rank, judge_transport(collective)
    if measured.no_collective:
        for rank in measured.nodes.keys() - measured.collectives.keys():
            yield rank, skipped("all-reduce", measured.no_collective)


JUDGEMENTS = (
    judge_present,
    judge_agree,
    judge_reach,
    judge_mtu,
    judge_speed,
    judge_clock,
    judge_shared,
    judge_collective,
)
