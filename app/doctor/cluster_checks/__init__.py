"""What only several nodes know together: pure judgements of what they measured, each finding at the node to look at."""

from collections import Counter
from collections.abc import Mapping

from app.doctor.cluster_checks.mtu import judge_mtu
from app.doctor.findings import Finding, Row, Severity, green, skipped, wrong
from app.doctor.results import Found, Measured
from app.gang.agreement import differences, told_nodes
from app.gang.probes import allow

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
        yield rank, wrong("node-missing", reason=why)
    for rank, node in measured.nodes.items():
        if rank in measured.lost:
            yield rank, wrong("node-lost", reason=measured.lost[rank])
        else:
            yield rank, green("present", "host {host}", host=node.host)
    for sentence in measured.doubles:
        yield min(measured.nodes), wrong("rank-claimed-twice", sentence=sentence)


def judge_agree(measured: Measured) -> Found:
    """Facts that differ, at the nodes that differ from most of the others (on a tie from node 0)."""
    if len(measured.nodes) < 2:
        return
    wrong_at: set[int] = set()
    for name in sorted({name for node in measured.nodes.values() for name in node.facts} - {"mtu"}):
        values = {rank: node.facts.get(name, "-") for rank, node in measured.nodes.items()}
        if len({*values.values()}) == 1:
            continue
        finding = _difference(name, values)
        counts = Counter(values.values())
        usual = max(values.values(), key=lambda value: counts[value])
        for rank in values:
            if values[rank] != usual:
                wrong_at.add(rank)
                yield rank, finding
    for rank in measured.nodes.keys() - wrong_at:
        facts = len(measured.nodes[rank].facts)
        yield rank, green("agree", "{facts} settings and versions as on most nodes", facts=facts)


def _difference(name: str, values: Mapping[int, str]) -> Finding:
    refused, doubtful = differences({rank: {name: value} for rank, value in values.items()})
    lines = [" ".join(line.split()) for line in (refused or doubtful).splitlines()]
    shown = [line for line in lines if line.startswith(("package ", "and "))] or lines[:1]
    remedy = " ".join(lines[len(shown) :]) or "set it the same on all nodes, or use the same image"
    level = Severity.RED if refused else Severity.YELLOW
    return wrong("setting-differs", level, setting=name, differences="; ".join(shown), remedy=remedy)


def judge_reach(measured: Measured) -> Found:
    """Connections that fail, at the node that does not let them in."""
    bad: set[int] = set()
    for (source, target, why), ports in measured.blocked.items():
        caller, called = measured.nodes[source], measured.nodes[target]
        bad.add(target)
        remedy = allow(caller.address, called.address)
        if why.startswith("connects"):
            remedy = f"ip link show {called.interface}   # on both nodes"
        shown, several = " and ".join(map(str, sorted(ports))), len(ports) > 1
        found = wrong("port-blocked", peer=caller.name, ports=shown, reason=why, several=several, remedy=remedy)
        yield target, found
    for rank in measured.nodes.keys() - bad - measured.lost.keys():
        callers = sorted(source for source, target in measured.tried if target == rank)
        if callers:
            verb = "connects" if len(callers) == 1 else "connect"
            yield (
                rank,
                green("reach", "{callers} {verb} to it on random ports", callers=told_nodes(callers), verb=verb),
            )
        else:
            yield rank, skipped("reach", "no other node is here")


def judge_clock(measured: Measured) -> Found:
    for rank, (offset, doubt) in measured.offsets.items():
        if abs(offset) - doubt > CLOCKS_APART:
            direction = "ahead of" if offset > 0 else "behind"
            yield rank, wrong("clock-differs", seconds=abs(offset), direction=direction)


def judge_shared(measured: Measured) -> Found:
    """Is the checkpoint folder one for all nodes, one for each, or a mixture (which is never meant)?"""
    seen = measured.seen
    if len(seen) < 2:
        return
    everyone = frozenset(seen)
    if all(others == everyone for others in seen.values()):
        yield from ((rank, green("shared", "one checkpoint folder for all nodes")) for rank in seen)
    elif all(others == {rank} for rank, others in seen.items()):
        text = "each node has its own checkpoint folder; sharded checkpoints (FSDP, DCP) need one for all"
        yield from ((rank, green("shared", text)) for rank in seen)
    else:
        for rank, others in seen.items():
            alone = others == {rank}
            nodes = [other for other in seen if len(seen[other]) > 1] if alone else others
            yield rank, wrong("folder-partly-shared", nodes=told_nodes(sorted(nodes)), alone=alone)


def judge_collective(measured: Measured) -> Found:
    """What each node found by itself when all of them ran bench's check; why not, where they did not."""
    for rank, findings in measured.collectives.items():
        yield from ((rank, finding) for finding in findings)
    if measured.no_collective:
        checks = ("speed", "all-reduce") if len(measured.listed) > 1 else ("all-reduce",)
        for rank in measured.nodes.keys() - measured.collectives.keys():
            yield from ((rank, skipped(check, measured.no_collective)) for check in checks)


JUDGEMENTS = (judge_present, judge_agree, judge_reach, judge_mtu, judge_clock, judge_shared, judge_collective)
