"""Runs one node's part of the job, from the roll call to the exit code: the one thing the entrypoint calls to run."""

import asyncio
import os
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping

from app.config.console import say
from app.config.errors import UserError
from app.config.exitcodes import ExitCode
from app.engine import torchrun
from app.engine.warm import Preloaded
from app.gang.agreement import gather
from app.gang.connection import MAX_LINE, Wire, listen
from app.gang.coordinator import LAST_WORD, LINGER, Hub
from app.gang.participant import Member, Place, Surroundings
from app.gang.token import read_token
from app.gang.verdict import Verdict
from app.host.ports import holder
from app.plan import Plan
from app.report.history import keep_left_out, keep_round
from app.report.node_report import forget_report, make_report, read_counters, write_report
from app.supervise import traffic
from app.supervise.hang import forget_signs, watched
from app.supervise.health import keep_state
from app.supervise.progress import Looks
from app.supervise.restart_guard import forget_final, reserve_final, write_final

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOST_FILES = 65_536


def supervise(plan: Plan) -> int:
    """Brings this node into the gang, runs torchrun round by round, and returns the exit code (`ExitCode`).

    Raises UserError where a file or folder of the settings cannot be used."""
    token = read_token(plan)
    make_folders(plan)
    reserve_final()
    torchrun.adopt_orphans()
    allow_many_files()
    preloaded = preload(plan)
    started, before = time.time(), read_counters()

    def tell(verdict: Verdict) -> None:
        if verdict.code == ExitCode.DONE:
            forget_report(plan)
        elif verdict.code != ExitCode.STOPPED:
            tell_report(plan, verdict, before, started)
        # The last line is what people read first.
        say(verdict.text)

    verdict, own_stop = asyncio.run(_take_part(plan, token, preloaded, tell))
    if verdict.code in (ExitCode.DONE, ExitCode.STOPPED):
        forget_final()
    if verdict.code == ExitCode.STOPPED:
        return int(verdict.code) if own_stop else plan.stopped_exit_code
    if verdict.code not in (ExitCode.DONE, ExitCode.FAILED):
        write_final(int(verdict.code), verdict.text)
    return int(verdict.code)


def preload(plan: Plan) -> Preloaded:
    """Begins to load what PRELOAD names: before the nodes meet, since that takes as long."""

    def tell(name: str, why: str) -> None:
        say(f"PRELOAD: left out {name}: {why}")
        keep_left_out(plan, name, why)

    preloaded = Preloaded(plan.script.preload, torchrun.environment(plan, os.environ, run_id=""), tell)
    preloaded.start()
    return preloaded


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


async def _take_part(
    plan: Plan, token: bytes, preloaded: Preloaded, tell: Callable[[Verdict], None]
) -> tuple[Verdict, bool]:
    """The verdict, and whether the stop came from this node's own user. `tell` prints the verdict as soon as there is
    one: node 0 may stay for a while to tell others."""
    hub = Hub(plan, token, say)
    server = await _listen(plan, hub)
    presiding = asyncio.ensure_future(hub.preside()) if server or plan.nodes.count == 1 else None
    looks = Looks(plan)
    path, state = keep_state(plan.run_name, plan.nodes.rank, lambda: looks.progress)
    around = Surroundings(
        dial=_dial_inside(hub) if presiding else _dial(plan),
        launch=lambda place: _launch(plan, place, preloaded),
        clean=lambda: torchrun.sweep(preloaded.pid),
        progress=lambda: looks.progress,
        stalls=lambda: looks.stalls,
        look=looks.renew,
        holder=holder,
        say=say,
        state=state,
    )
    watching = asyncio.ensure_future(traffic.watch(plan, say)) if traffic.watched(plan) else None
    member = Member(plan, token, gather(plan) if plan.nodes.count > 1 else {}, around)
    _on_signals(member.stop)
    part = asyncio.ensure_future(member.take_part())
    try:
        # A bug in node 0's hub must end the job with its traceback, not leave it waiting for a verdict.
        await asyncio.wait([part, presiding] if presiding else [part], return_when=asyncio.FIRST_COMPLETED)
        if presiding and presiding.done():
            presiding.result()
        verdict = await part
        own_stop = member.stops > 0
        tell(verdict)
        if presiding and member.stops < 2:
            # The others are told meanwhile. What made this node's member leave by itself, the hub does not know yet.
            hub.conclude(verdict)
            _on_signals(presiding.cancel)
            await asyncio.wait([presiding], timeout=LINGER + 2 * LAST_WORD)
    finally:
        part.cancel()
        if watching:
            watching.cancel()
        if presiding:
            presiding.cancel()
        path.unlink(missing_ok=True)
        forget_signs()
        if server:
            server.close()
        preloaded.stop()
        torchrun.sweep()
    return verdict, own_stop


def _on_signals(act: Callable[[], object]) -> None:
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, act)


async def _listen(plan: Plan, hub: Hub) -> asyncio.Server | None:
    """Node 0's ear, on its fabric address only. None on other nodes, and where another process has the port: that one
    may be a second node 0 or another job, and will say so when this node comes as a guest."""
    if plan.nodes.rank or plan.nodes.count == 1:
        return None
    try:
        return await listen(
            hub.serve, plan.network.address, plan.network.control_port, backlog=2 * plan.nodes.count + 64
        )
    except OSError as error:
        say(
            f"node 0 cannot listen on {plan.network.address} port {plan.network.control_port}: "
            f"{os.strerror(error.errno or 0).lower()}"
        )
        return None


def _dial(plan: Plan) -> Callable[[], Awaitable[Wire]]:
    async def dial() -> Wire:
        own = (plan.network.address, 0)
        return Wire(
            *await asyncio.open_connection(
                plan.nodes.addresses[0], plan.network.control_port, local_addr=own, limit=MAX_LINE
            )
        )

    return dial


def _dial_inside(hub: Hub) -> Callable[[], Awaitable[Wire]]:
    """Node 0 is a member of its own gang, over a pair of sockets that nobody else can reach."""
    tasks = set()

    async def dial() -> Wire:
        here, there = socket.socketpair()
        tasks.add(asyncio.ensure_future(hub.serve(*await asyncio.open_connection(sock=there, limit=MAX_LINE))))
        return Wire(*await asyncio.open_connection(sock=here, limit=MAX_LINE))

    return dial


def _launch(plan: Plan, place: Place, preloaded: Preloaded) -> torchrun.Torchrun:
    command = torchrun.command_line(
        plan,
        node_rank=place.node_rank,
        nnodes=place.nnodes,
        master_addr=plan.network.master_addr,
        master_port=plan.network.master_port,
        run_id=place.run_id,
    )
    if place.round > 1:
        say(f"round {place.round}: node rank {place.node_rank} of {place.nnodes}")
    environment = {**torchrun.environment(plan, os.environ, run_id=place.run_id), **watched(plan)}
    return torchrun.Torchrun(
        command, environment, lambda outcome: keep_round(plan, place.run_id, outcome), preloaded=preloaded
    )
