"""What one node knows by itself. Each check is one function: facts in, findings out; none reads, waits or connects."""

from collections.abc import Callable

from app.doctor.facts import Facts
from app.doctor.findings import Finding, green, skipped
from app.doctor.node_checks.machine import check_clock, check_disk, check_engine, check_gpus, check_limits
from app.doctor.node_checks.network import check_names, check_network, check_ports, check_rdma
from app.doctor.planned import planned


def check_node(facts: Facts) -> tuple[Finding, ...]:
    """All findings of one node: what the plan says is wrong, and each check's own; every check answers."""
    of_plan = planned(facts.draft)
    covered = {each.check for each in of_plan}
    own = [finding for check in CHECKERS for finding in check(facts)]
    # A green cell next to the plan's warning would say nothing.
    return (*of_plan, *(each for each in own if each.bad or each.check not in covered))


def check_rank(facts: Facts) -> tuple[Finding, ...]:
    plan = facts.plan
    if not plan:
        rank = facts.draft.rank
        return (skipped("rank", "not decided") if rank is None else green("rank", "{rank}", rank=rank),)
    nodes, network = plan.nodes, plan.network
    where = f"{network.address} on {network.interface} ({nodes.rank_source})"
    return (green("rank", "{rank} of {nodes}, {where}", rank=nodes.rank, nodes=nodes.count, where=where),)


def check_settings(facts: Facts) -> tuple[Finding, ...]:
    plan = facts.plan
    if not plan:
        return ()
    command, workers = " ".join(plan.script.command), plan.workers
    text = "{command}, {processes} per node, {backend}"
    return (green("settings", text, command=command, processes=workers.nproc, backend=workers.backend),)


CHECKERS: tuple[Callable[[Facts], tuple[Finding, ...]], ...] = (
    check_rank,
    check_settings,
    check_network,
    check_names,
    check_ports,
    check_rdma,
    check_gpus,
    check_limits,
    check_disk,
    check_clock,
    check_engine,
)
