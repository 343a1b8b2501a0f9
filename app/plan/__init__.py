"""The launch plan: the only place where decisions are made, each with its source and reason."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app.config.envfile import Value
from app.config.errors import Problem
from app.config.settings import Settings
from app.host import Host, probe
from app.plan.classic import decide_classic
from app.plan.consistency import must_be_equal
from app.plan.decisions import Decision, Ledger, count, shown
from app.plan.env_warnings import warn_costs, warn_elsewhere, warn_typos
from app.plan.exports import Exports, common_exports, environment, keep_others, removals
from app.plan.node_list import NodeList, names_to_resolve
from app.plan.network import decide_interface
from app.plan.nodes import decide_listed
from app.plan.rdma import decide_rdma
from app.plan.resource_checks import check_needs
from app.plan.script import (
    Script,
    decide_script,
    files_to_look_at,
    log_dir,
    module_to_find,
    program_to_find,
    warn_script,
)
from app.plan.timeouts import decide_times
from app.plan.workers import Workers, decide_workers

__all__ = ["Decision", "Draft", "Plan", "Problem", "draft", "make_plan", "probe_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a launch on this node uses."""

    run_name: str
    node_rank: int
    nodes: tuple[str, ...]
    """Literal addresses in rank order; "" where only the roll call can tell (classic variables)."""
    names: tuple[str, ...]
    """The same nodes as the user wrote them."""
    interface: str
    address: str
    """This node's own address, on `interface`."""
    nproc_per_node: str
    """For torchrun: always the resolved number, so that all parts count alike."""
    nproc: int
    master_addr: str
    master_port: int
    control_port: int
    backend: str
    transport: str
    """What NCCL will use between nodes: `InfiniBand`, `RoCE` or `sockets`."""
    command: tuple[str, ...]
    """The script part of torchrun's command."""
    env: Mapping[str, str] = field(repr=False)
    """To add to the process environment for torchrun, sorted by name; secrets of the user's included."""
    removed: tuple[str, ...]
    """To take out of the process environment first."""
    run_dir: Path
    checkpoint_dir: Path
    start_timeout: float
    """Seconds, as the other times."""
    rejoin_timeout: float
    stop_grace: float
    heartbeat_timeout: float
    hang_report: float
    """0: never."""
    hang_timeout: float
    """0: never."""
    max_restarts: int
    min_nodes: int
    stopped_exit_code: int
    token_file: Path | None
    equal: tuple[tuple[str, str], ...]
    """What must be the same on all nodes, by name."""
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    @property
    def world_size(self) -> int:
        return len(self.nodes) * self.nproc

    @property
    def log_dir(self) -> Path:
        """Of this node alone: the nodes may share RUN_DIR, and all have the same run ids."""
        return log_dir(self.run_dir, self.node_rank)

    @property
    def report_dir(self) -> Path:
        """Where this node's report of a failure lies."""
        return self.run_dir / "report" / f"node{self.node_rank}"

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
    member = _decide_member(settings, host, ledger)
    ports = _decide_ports(settings, host, ledger)
    workers = decide_workers(settings, host, ledger, exports)
    own = None if member is None else member.own
    if member is not None:
        decide_interface(member, host, ledger, exports)
    transport = decide_rdma(host, own, workers.backend, ledger, exports)
    check_needs(host, workers, transport, ledger)
    script = decide_script(settings, host, ledger)
    common_exports(exports, host, script, ports.ras, 0 if member is None else member.rank)
    min_nodes = decide_times(settings, host, member, ledger)
    if member is not None:
        warn_script(script, settings, host, len(member.nodes), ledger)
        _decide_command(member, workers, ports, script, ledger)
    keep_others(exports)
    env = environment(settings, exports)
    removed = removals(settings, env, ledger)
    warn_costs(settings, host, ledger)
    if member is not None:
        warn_elsewhere(settings, host, member, workers.backend, ledger)
    warn_typos(settings, ledger)
    plan = None
    if member is not None and not ledger.problems:
        plan = _plan(settings, host, ledger, member, workers, transport, script, ports, env, removed, min_nodes)
    return Draft(
        plan=plan,
        problems=tuple(ledger.problems),
        decisions=tuple(ledger.decisions),
        warnings=tuple(ledger.warnings),
    )


def _decide_member(settings: Settings, host: Host, ledger: Ledger) -> Membership | None:
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


def _decide_command(member: Membership, workers: Workers, ports: Ports, script: Script, ledger: Ledger) -> None:
    nnodes, nproc = len(member.nodes), workers.nproc
    first = member.rank * nproc
    here = f"rank {first} is" if nproc == 1 else f"ranks {first} to {first + nproc - 1} are"
    product = f"{count(nnodes, 'node')} x {count(nproc, 'process', 'processes')}; {here} on this node"
    ledger.decide("world size", nnodes * nproc, "derived", product)
    words = [
        f"--nnodes={nnodes}",
        f"--nproc-per-node={nproc}",
        f"--node-rank={member.rank}",
        f"--master-addr={member.nodes[0]}",
        f"--master-port={ports.master}",
        *script.command,
    ]
    ledger.decide("torchrun", shlex.join(words), "derived", "the part of its command line that places the ranks")


def _plan(
    settings: Settings,
    host: Host,
    ledger: Ledger,
    member: Membership,
    workers: Workers,
    transport: str,
    script: Script,
    ports: Ports,
    env: Mapping[str, str],
    removed: tuple[str, ...],
    min_nodes: int,
) -> Plan:
    return Plan(
        run_name=settings.text("RUN_NAME"),
        node_rank=member.rank,
        nodes=member.nodes,
        names=member.names,
        interface=member.own.interface,
        address=member.own.address,
        nproc_per_node=str(workers.nproc),
        nproc=workers.nproc,
        master_addr=member.nodes[0],
        master_port=ports.master,
        control_port=ports.control,
        backend=workers.backend,
        transport=transport,
        command=script.command,
        env=env,
        removed=removed,
        run_dir=script.run_dir,
        checkpoint_dir=script.checkpoint_dir,
        start_timeout=float(settings.text("START_TIMEOUT")),
        rejoin_timeout=float(settings.text("REJOIN_TIMEOUT")),
        stop_grace=float(settings.text("STOP_GRACE")),
        heartbeat_timeout=float(settings.text("HEARTBEAT_TIMEOUT")),
        hang_report=float(settings.text("HANG_REPORT")),
        hang_timeout=float(settings.text("HANG_TIMEOUT") or 0),
        max_restarts=int(settings.text("MAX_RESTARTS")),
        min_nodes=min_nodes,
        stopped_exit_code=int(settings.text("STOPPED_EXIT_CODE")),
        token_file=script.token_file,
        equal=must_be_equal(settings, host, member, workers, transport, script, ports.control),
        decisions=tuple(ledger.decisions),
        warnings=tuple(ledger.warnings),
    )
