"""The launch plan: the only place where decisions are made, each with its source and reason."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from app.config.envfile import Value
from app.config.errors import Problem
from app.config.settings import Settings
from app.host import Host, probe
from app.plan.checkpoints import decide_checkpoints
from app.plan.classic import decide_classic
from app.plan.consistency import must_be_equal
from app.plan.decisions import Decision, Ledger, count, shown
from app.plan.env_warnings import warn_costs, warn_elsewhere, warn_typos
from app.plan.exports import Exports, common_exports, environment, keep_others, removals
from app.plan.network import decide_interface
from app.plan.node_list import NodeList, names_to_resolve
from app.plan.nodes import decide_listed
from app.plan.parts import Checkpoints, Network, Nodes, Script, Timeouts, Workers
from app.plan.rdma import decide_rdma
from app.plan.resource_checks import check_needs
from app.plan.script import decide_script, decide_token, files_to_look_at, log_dir, module_to_find
from app.plan.timeouts import decide_times
from app.plan.workers import decide_workers

__all__ = ["Decision", "Draft", "Plan", "Problem", "draft", "make_plan", "probe_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a launch on this node uses."""

    run_name: str
    nodes: Nodes
    network: Network
    workers: Workers
    script: Script
    checkpoints: Checkpoints
    timeouts: Timeouts
    max_restarts: int
    stopped_exit_code: int
    token_file: Path | None
    equal: tuple[tuple[str, str], ...]
    """What must be the same on all nodes, by name."""
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    @property
    def world_size(self) -> int:
        return self.nodes.count * self.workers.nproc

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
    problems: tuple[Problem, ...]
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    master: int
    control: int
    ras: int


def probe_for(settings: Settings, root: Path = Path("/")) -> Host:
    """The facts that a plan of these settings needs: the machine, the names to resolve, the files to look at."""
    return probe(
        root,
        resolve=names_to_resolve(settings),
        paths=files_to_look_at(settings),
        module=module_to_find(settings),
        python_path=settings.text("PYTHONPATH"),
    )


def make_plan(settings: Settings, host: Host) -> Plan | tuple[Problem, ...]:
    """The plan, or all that stands in its way. Pure and total: no clock, no network, no files, never raises."""
    result = draft(settings, host)
    return result.problems if result.plan is None else result.plan


def draft(settings: Settings, host: Host) -> Draft:
    """Decides everything that can be decided, and collects what is wrong."""
    ledger = Ledger(problems=list(settings.problems))
    exports = Exports(settings=settings, ledger=ledger)
    member = _decide_member(settings, host, ledger)
    ports = _decide_ports(settings, host, ledger)
    workers = decide_workers(settings, host, ledger, exports)
    own = None if member is None else member.own
    if member is not None:
        decide_interface(member, host, ledger, exports)
    transport = decide_rdma(host, own, workers.backend, ledger, exports)
    check_needs(host, workers, transport, ledger)
    script = decide_script(settings, host, ledger)
    token_file = decide_token(settings, host, ledger)
    common_exports(exports, host, script, ports.ras, 0 if member is None else member.rank)
    checkpoints = decide_checkpoints(settings, 1 if member is None else len(member.addresses), ledger)
    min_nodes = decide_times(settings, host, member, ledger)
    if member is not None:
        _decide_command(member, workers, ports, script, ledger)
    keep_others(exports)
    env = environment(settings, exports)
    script = replace(script, env=env, removed=removals(settings, env, ledger))
    warn_costs(settings, host, ledger)
    if member is not None:
        warn_elsewhere(settings, host, member, workers.backend, ledger)
    warn_typos(settings, ledger)
    plan = None
    if member is not None and not ledger.problems:
        plan = _plan(
            settings, host, ledger, member, workers, transport, script, checkpoints, token_file, ports, min_nodes
        )
    return Draft(
        plan=plan,
        problems=tuple(ledger.problems),
        decisions=tuple(ledger.decisions),
        warnings=tuple(ledger.warnings),
    )


def _decide_member(settings: Settings, host: Host, ledger: Ledger) -> NodeList | None:
    written = settings.values.get("NODES")
    if written is not None:
        return decide_listed(written, settings, host, ledger)
    if any(problem.setting in ("NODES", "NODE_RANK", "NNODES", "MASTER_ADDR") for problem in ledger.problems):
        return None
    return decide_classic(settings, host, ledger)


def _decide_ports(settings: Settings, host: Host, ledger: Ledger) -> Ports:
    master_value, control_value = settings.get("MASTER_PORT"), settings.values.get("CONTROL_PORT")
    master = int(settings.text("MASTER_PORT"))
    if master_value is not None:
        ledger.take("MASTER_PORT", master_value, "torchrun's store on node 0")
    control = int(control_value.text) if control_value else _near(master, 1)
    if control_value is not None:
        ledger.take("CONTROL_PORT", control_value, "the nodes' own talk")
        if control == master:
            ledger.refuse(
                "CONTROL_PORT",
                f"{shown('CONTROL_PORT', control_value)} is MASTER_PORT as well. Give them different ports.",
            )
    else:
        ledger.decide("CONTROL_PORT", control, "derived", "the nodes' own talk, next to MASTER_PORT")
    derived = Value(text=str(control), source="derived")
    for name, value in (("MASTER_PORT", master_value), ("CONTROL_PORT", control_value or derived)):
        if value is not None:
            _warn_port(name, value, host, ledger)
    ras = next(port for step in (2, 3) if (port := _near(master, step)) != control)
    return Ports(master=master, control=control, ras=ras)


def _near(port: int, step: int) -> int:
    return port + step if port + step <= 65535 else port - step


def _warn_port(name: str, value: Value, host: Host, ledger: Ledger) -> None:
    port = int(value.text)
    if port < host.first_user_port and host.uid != 0:
        ledger.warn(f"{shown(name, value)} needs root: ports below {host.first_user_port} do. Choose a higher one.")
    span = host.ephemeral_ports
    if span is not None and span[0] <= port <= span[1]:
        ledger.warn(
            f"{shown(name, value)} is one of the ports that the kernel hands out by itself ({span[0]} to {span[1]}), "
            "so another program may hold it. Choose one outside."
        )


def _decide_command(member: NodeList, workers: Workers, ports: Ports, script: Script, ledger: Ledger) -> None:
    nnodes, nproc = len(member.addresses), workers.nproc
    first = member.rank * nproc
    here = f"rank {first} is" if nproc == 1 else f"ranks {first} to {first + nproc - 1} are"
    product = f"{count(nnodes, 'node')} x {count(nproc, 'process', 'processes')}; {here} on this node"
    ledger.decide("world size", nnodes * nproc, "derived", product)
    words = [
        f"--nnodes={nnodes}",
        f"--nproc-per-node={nproc}",
        f"--node-rank={member.rank}",
        f"--master-addr={member.addresses[0]}",
        f"--master-port={ports.master}",
        *script.command,
    ]
    ledger.decide("torchrun", shlex.join(words), "derived", "the part of its command line that places the ranks")


def _plan(
    settings: Settings,
    host: Host,
    ledger: Ledger,
    member: NodeList,
    workers: Workers,
    transport: str,
    script: Script,
    checkpoints: Checkpoints,
    token_file: Path | None,
    ports: Ports,
    min_nodes: int,
) -> Plan:
    return Plan(
        run_name=settings.text("RUN_NAME"),
        nodes=Nodes(rank=member.rank, addresses=member.addresses, names=member.names, minimum=min_nodes),
        network=Network(
            interface=member.own.interface,
            address=member.own.address,
            transport=transport,
            master_addr=member.addresses[0],
            master_port=ports.master,
            control_port=ports.control,
        ),
        workers=workers,
        script=script,
        checkpoints=checkpoints,
        timeouts=Timeouts(
            start=float(settings.text("START_TIMEOUT")),
            rejoin=float(settings.text("REJOIN_TIMEOUT")),
            stop_grace=float(settings.text("STOP_GRACE")),
            heartbeat=float(settings.text("HEARTBEAT_TIMEOUT")),
            hang_report=float(settings.text("HANG_REPORT")),
            hang_timeout=float(settings.text("HANG_TIMEOUT") or 0),
        ),
        max_restarts=int(settings.text("MAX_RESTARTS")),
        stopped_exit_code=int(settings.text("STOPPED_EXIT_CODE")),
        token_file=token_file,
        equal=must_be_equal(settings, host, member, workers, transport, script, ports.control),
        decisions=tuple(ledger.decisions),
        warnings=tuple(ledger.warnings),
    )
