"""What one node knows by itself. Each check is one function: facts in, findings out; none reads, waits or connects."""

from collections.abc import Callable

from app.doctor.facts import Facts
from app.doctor.findings import Finding, Level, green
from app.doctor.machine import check_clock, check_disk, check_engine, check_gpus, check_limits
from app.doctor.network import check_names, check_network, check_ports, check_rdma
from app.doctor.planned import PROBLEMS, problems, warnings


def check_node(facts: Facts) -> tuple[Finding, ...]:
    """All findings of one node: what the plan says is wrong, and each check's own; every check answers."""
    planned = (*problems(facts.draft), *warnings(facts.draft))
    said = {each.check for each in planned}
    own = [finding for check in CHECKERS for finding in check(facts)]
    # A green cell next to the plan's warning would say nothing.
    return (*planned, *(each for each in own if each.level in (Level.YELLOW, Level.RED) or each.check not in said))


def check_rank(facts: Facts) -> tuple[Finding, ...]:
    if not facts.plan:
        if any(PROBLEMS.get(problem.setting) == "rank" for problem in facts.draft.problems):
            return ()
        return (green("rank", "decided, but other settings are wrong"),)
    rank = facts.decision("NODE_RANK")
    why = f" ({rank.source})" if rank else ""
    plan = facts.plan
    return (
        green(
            "rank", f"{plan.nodes.rank} of {plan.nodes.count}, {plan.network.address} on {plan.network.interface}{why}"
        ),
    )


def check_settings(facts: Facts) -> tuple[Finding, ...]:
    if not facts.plan:
        return ()
    command = " ".join(facts.plan.script.command)
    return (green("settings", f"{command}, {facts.plan.workers.nproc} per node, {facts.plan.workers.backend}"),)


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
