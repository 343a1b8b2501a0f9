"""The launch plan: the only place where decisions are made, each with its source and reason."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from app.config.problems import Problem, count
from app.config.settings import Settings
from app.host import Host, probe
from app.plan.checkpoints import decide_checkpoints
from app.plan.classic import decide_classic
from app.plan.consistency import must_be_equal
from app.plan.decisions import Decision, Ledger
from app.plan.env_warnings import warn_costs, warn_elsewhere, warn_typos
from app.plan.exports import Exports, common_exports, environment, keep_others, removals
from app.plan.monitoring import decide_monitoring
from app.plan.network import decide_interface
from app.plan.node_list import NodeList, names_to_resolve
from app.plan.nodes import decide_listed
from app.plan.parts import CheckpointExchange, JobNodes, LocalWorkers, Monitoring, Network, Script, Timeouts
from app.plan.ports import Ports, decide_ports
from app.plan.rdma import decide_rdma
from app.plan.resource_checks import check_needs
from app.plan.script import (
    decide_script,
    decide_token,
    files_to_look_at,
    log_dir,
    module_to_find,
    program_to_find,
    warn_script,
)
from app.plan.timeouts import decide_minimum, decide_timeouts
from app.plan.workers import decide_workers

__all__ = ["Decision", "Draft", "Plan", "Problem", "draft", "make_plan", "probe_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a launch on this node uses."""

    run_name: str
    nodes: JobNodes
    network: Network
    workers: LocalWorkers
    script: Script
    checkpoints: CheckpointExchange
    timeouts: Timeouts
    monitoring: Monitoring
    max_restarts: int
    stopped_exit_code: int
    token_file: Path | None
    equal: tuple[tuple[str, str], ...]
    """What must be the same on all nodes, by name."""
    decisions: tuple[Decision, ...]
    warnings: tuple[Problem, ...]

    @property
    def world_size(self) -> int:
        return self.nodes.training * self.workers.nproc

    @property
    def log_dir(self) -> Path:
        """Of this node alone: the nodes may share RUN_DIR, and all have the same run ids."""
        return log_dir(self.script.run_dir, self.nodes.rank)

    @property
    def report_dir(self) -> Path:
        """Where this node's report of a failure lies."""
        return self.script.run_dir / "report" / f"node{self.nodes.rank}"

    @property
    def stall_dir(self) -> Path:
        """Where this node's ranks write that they stand still, and keep their stacks for the report."""
        return self.report_dir / "stalls"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What could be decided, also where something is wrong: what `explain` shows."""

    plan: Plan | None
    rank: int | None = None
    """Of this node, where it could be decided."""
    run_dir: Path
    problems: tuple[Problem, ...]
    decisions: tuple[Decision, ...]
    warnings: tuple[Problem, ...]


def probe_for(settings: Settings, root: Path = Path("/")) -> Host:
    """The facts that a plan of these settings needs: the machine, the names to resolve, the files to look at."""
    return probe(
        root,
        resolve=names_to_resolve(settings),
        paths=files_to_look_at(settings),
        module=module_to_find(settings),
        python_path=settings.text("PYTHONPATH"),
        program=program_to_find(settings),
    )


def make_plan(settings: Settings, host: Host) -> Plan | tuple[Problem, ...]:
    """The plan, or all that stands in its way. Pure and total: no clock, no network, no files, never raises."""
    result = draft(settings, host)
    return result.problems if result.plan is None else result.plan


def draft(settings: Settings, host: Host) -> Draft:
    """Decides everything that can be decided, and collects what is wrong."""
    ledger = Ledger(problems=list(settings.problems))
    exports = Exports(settings=settings, ledger=ledger)
    nodes = _decide_nodes(settings, host, ledger)
    ports = decide_ports(settings, host, ledger)
    workers = decide_workers(settings, host, ledger, exports)
    own = None if nodes is None else nodes.own
    if own is not None:
        decide_interface(own, host, ledger, exports)
    transport, rdma_ports = decide_rdma(host, own, workers.backend, ledger, exports)
    check_needs(host, workers, transport, ledger)
    rank, size = (0, None) if nodes is None else (nodes.rank, len(nodes.addresses))
    script = _with_environment(decide_script(settings, host, ledger), host, ports, rank, exports)
    token_file = decide_token(settings, host, ledger)
    checkpoints = decide_checkpoints(settings, size or 1, ledger)
    timeouts = decide_timeouts(settings, host, ledger)
    minimum = decide_minimum(settings, size, ledger)
    monitoring = decide_monitoring(settings, ledger)
    warn_costs(settings, host, ledger)
    plan = None
    if nodes is not None:
        warn_script(script, settings, host, len(nodes.addresses), ledger)
        warn_elsewhere(settings, host, nodes, workers.backend, ledger)
        _show_command(nodes, settings.spares.value, workers, ports, script, ledger)
    warn_typos(settings, ledger)
    if nodes is not None and not ledger.problems:
        plan = Plan(
            run_name=settings.run_name.value,
            nodes=_nodes(nodes, minimum, settings),
            network=_network(nodes, ports, transport, rdma_ports),
            workers=workers,
            script=script,
            checkpoints=checkpoints,
            timeouts=timeouts,
            monitoring=monitoring,
            max_restarts=settings.max_restarts.value,
            stopped_exit_code=settings.stopped_exit_code.value,
            token_file=token_file,
            equal=must_be_equal(settings, host, nodes, workers, transport, script, ports.control),
            decisions=tuple(ledger.decisions),
            warnings=tuple(ledger.warnings),
        )
    return Draft(
        plan=plan,
        rank=None if nodes is None else nodes.rank,
        run_dir=script.run_dir,
        problems=tuple(ledger.problems),
        decisions=tuple(ledger.decisions),
        warnings=tuple(ledger.warnings),
    )


def _with_environment(script: Script, host: Host, ports: Ports, rank: int, exports: Exports) -> Script:
    common_exports(exports, host, script, ports.ras, rank)
    keep_others(exports, host)
    env = environment(exports)
    return replace(script, env=env, removed=removals(exports.settings, env, exports.ledger))


def _decide_nodes(settings: Settings, host: Host, ledger: Ledger) -> NodeList | None:
    if settings.nodes is not None:
        return decide_listed(settings.nodes, settings, host, ledger)
    if any(problem.setting in ("NODES", "NODE_RANK", "NNODES", "MASTER_ADDR") for problem in ledger.problems):
        return None
    return decide_classic(settings, host, ledger)


def _nodes(nodes: NodeList, minimum: int, settings: Settings) -> JobNodes:
    return JobNodes(
        rank=nodes.rank,
        rank_source=nodes.rank_source,
        addresses=nodes.addresses,
        names=nodes.names,
        minimum=minimum,
        spares=settings.spares.value,
        regrow=settings.regrow.value == "checkpoint",
    )


def _network(nodes: NodeList, ports: Ports, transport: str, rdma_ports: tuple[str, ...]) -> Network:
    return Network(
        interface=nodes.own.interface,
        address=nodes.own.address,
        transport=transport,
        rdma_ports=rdma_ports,
        master_addr=nodes.addresses[0],
        master_port=ports.master,
        control_port=ports.control,
    )


def _show_command(
    nodes: NodeList, spares: int, workers: LocalWorkers, ports: Ports, script: Script, ledger: Ledger
) -> None:
    nnodes, nproc = len(nodes.addresses) - spares, workers.nproc
    first = nodes.rank * nproc
    here = f"rank {first} is on this node" if nproc == 1 else f"ranks {first} to {first + nproc - 1} are on this node"
    if nodes.rank >= nnodes:
        here = "this node is a spare"
    product = f"{count(nnodes, 'node')} x {count(nproc, 'process', 'processes')}; {here}"
    ledger.decide("gpus", "world size", nnodes * nproc, "derived", product)
    if nodes.rank >= nnodes:
        return
    words = [
        f"--nnodes={nnodes}",
        f"--nproc-per-node={nproc}",
        f"--node-rank={nodes.rank}",
        f"--master-addr={nodes.addresses[0]}",
        f"--master-port={ports.master}",
        *script.command,
    ]
    places = "the part of its command line that places the ranks"
    ledger.decide("script", "torchrun", shlex.join(words), "derived", places)
