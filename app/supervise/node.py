"""Runs one node's part of the job, from the roll call to the exit code: the one thing the entrypoint calls to run."""

import asyncio
import os
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from app.config.console import say
from app.config.errors import UserError
from app.config.exitcodes import ExitCode
from app.engine import torchrun
from app.gang.agreement import gather
from app.gang.connection import Connection, dial, dial_inside, listen
from app.gang.coordinator import LAST_WORD, LINGER, Coordinator
from app.gang.participant import NodeServices, Participant, RoundAssignment
from app.gang.token import read_token
from app.gang.verdict import Verdict
from app.host.ports import holder
from app.plan import Plan
from app.report.history import keep_round
from app.report.node_report import forget_report, make_report, read_counters, write_report
from app.supervise import traffic
from app.supervise.hang import forget_signs, watched
from app.supervise.health import keep_state
from app.supervise.progress import Looks
from app.supervise.restart_guard import forget_final, reserve_final, write_final

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOST_FILES = 65_536


def supervise(plan: Plan) -> int:
    """Joins the job, runs torchrun round by round, and returns the exit code (`ExitCode`).

    Raises UserError where a file or folder of the settings cannot be used."""
    token = read_token(plan)
    make_folders(plan)
    reserve_final()
    torchrun.adopt_orphans()
    allow_many_files()
    started, before = time.time(), read_counters()

    def tell(verdict: Verdict) -> None:
        if verdict.code == ExitCode.DONE:
            forget_report(plan)
        elif verdict.code != ExitCode.STOPPED:
            tell_report(plan, verdict, before, started)
        # The last line is what people read first.
        say(verdict.text)

    verdict, own_stop = asyncio.run(_take_part(plan, token, tell))
    if verdict.code in (ExitCode.DONE, ExitCode.STOPPED):
        forget_final()
    if verdict.code == ExitCode.STOPPED:
        return int(verdict.code) if own_stop else plan.stopped_exit_code
    if verdict.code not in (ExitCode.DONE, ExitCode.FAILED):
        write_final(int(verdict.code), verdict.text)
    return int(verdict.code)


def tell_report(plan: Plan, verdict: Verdict, before: Mapping[str, int], started: float) -> None:
    """Writes this node's report, and prints where it is and what the known error in it means. Never raises: whatever is
    wrong with a report (a full disk, a bug), the verdict must be told."""
    try:
        report = make_report(plan, int(verdict.code), verdict.text, before, started)
        if report.names_cause:
            say(f"cause: {report.cause}\nfix: {report.fix}")
        say(f"kept for `report`: {write_report(plan, report)}")
    except Exception as error:
        say(f"no report: {type(error).__name__}: {error}")


def make_folders(plan: Plan) -> None:
    """The run's folder with its logs. Raises UserError."""
    try:
        plan.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"RUN_DIR={plan.script.run_dir} cannot be written: {error.strerror}.") from None


def allow_many_files() -> None:
    """Raises the soft limit of open files as far as it goes: 1,024, Docker's usual one, is less than 1,000 nodes and
    the data loaders of one node need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def _take_part(plan: Plan, token: bytes, tell: Callable[[Verdict], None]) -> tuple[Verdict, bool]:
    """The verdict, and whether the stop came from this node's own user. `tell` prints the verdict as soon as there is
    one: node 0 may stay for a while to tell others."""
    coordinator = Coordinator(plan, token, say)
    server = await _listen(plan, coordinator)
    leading = asyncio.ensure_future(coordinator.run()) if server or plan.nodes.count == 1 else None
    looks = Looks(plan)
    path, state = keep_state(plan.run_name, plan.nodes.rank, lambda: looks.progress)
    services = NodeServices(
        dial=dial_inside(coordinator.serve) if leading else _dial(plan),
        launch=lambda assignment: _launch(plan, assignment),
        clean=torchrun.sweep,
        progress=lambda: looks.progress,
        stalls=lambda: looks.stalls,
        refresh=looks.renew,
        holder=holder,
        say=say,
        state=state,
    )
    watching = asyncio.ensure_future(traffic.watch(plan, say)) if traffic.watched(plan) else None
    participant = Participant(plan, token, gather(plan) if plan.nodes.count > 1 else {}, services)
    _on_signals(participant.stop)
    part = asyncio.ensure_future(participant.take_part())
    try:
        # A bug in the coordinator must end the job with its traceback, not leave it waiting for a verdict.
        await asyncio.wait([part, leading] if leading else [part], return_when=asyncio.FIRST_COMPLETED)
        if leading and leading.done():
            leading.result()
        verdict = await part
        own_stop = participant.stops > 0
        tell(verdict)
        if leading and participant.stops < 2:
            # The others are told meanwhile. Why this node's participant left by itself, the coordinator does not know.
            coordinator.conclude(verdict)
            _on_signals(leading.cancel)
            await asyncio.wait([leading], timeout=LINGER + 2 * LAST_WORD)
    finally:
        part.cancel()
        if watching:
            watching.cancel()
        if leading:
            leading.cancel()
        path.unlink(missing_ok=True)
        forget_signs()
        if server:
            server.close()
        torchrun.sweep()
    return verdict, own_stop


def _on_signals(act: Callable[[], object]) -> None:
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, act)


async def _listen(plan: Plan, coordinator: Coordinator) -> asyncio.Server | None:
    """The coordinator's listening socket, on node 0's fabric address only. None on other nodes, and where another
    process has the port: that one may be a second node 0 or another job, and will say so when this node connects."""
    if plan.nodes.rank or plan.nodes.count == 1:
        return None
    address, port = plan.network.address, plan.network.control_port
    try:
        return await listen(coordinator.serve, address, port, plan.nodes.count)
    except OSError as error:
        say(f"node 0 cannot listen on {address} port {port}: {os.strerror(error.errno or 0).lower()}")
        return None


def _dial(plan: Plan) -> Callable[[], Awaitable[Connection]]:
    return partial(dial, plan.network.address, plan.nodes.addresses[0], plan.network.control_port)


def _launch(plan: Plan, assignment: RoundAssignment) -> torchrun.Torchrun:
    command = torchrun.command_line(
        plan,
        node_rank=assignment.node_rank,
        nnodes=assignment.nnodes,
        master_addr=plan.network.master_addr,
        master_port=plan.network.master_port,
        run_id=assignment.run_id,
    )
    if assignment.round > 1:
        say(f"round {assignment.round}: node rank {assignment.node_rank} of {assignment.nnodes}")
    environment = {**torchrun.environment(plan, os.environ, run_id=assignment.run_id), **watched(plan)}
    return torchrun.Torchrun(command, environment, lambda outcome: keep_round(plan, assignment.run_id, outcome))
