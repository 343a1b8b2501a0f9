"""Runs one node's part of the job, from the roll call to the exit code: the one thing the entrypoint calls to run."""

import asyncio
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping

from app.launch import torchrun, traffic
from app.launch.errors import UserError
from app.launch.exitcodes import ExitCode
from app.launch.final import forget_final, reserve_final, write_final
from app.launch.gang.facts import gather
from app.launch.gang.hub import LAST_WORD, LINGER, Hub
from app.launch.gang.member import Member, Place, Surroundings
from app.launch.gang.verdict import Verdict
from app.launch.gang.wire import MAX_LINE, Wire, listen
from app.launch.hang import forget_signs, watched
from app.launch.health import keep_state
from app.launch.history import keep_round
from app.launch.host.ports import holder
from app.launch.looks import Looks
from app.launch.plan import Plan
from app.launch.plan.script import SHORTEST_TOKEN
from app.launch.report import forget_report, make_report, read_counters, write_report

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
            say(f"cause: {report.cause}\ncure: {report.cure}")
        say(f"kept for `report`: {write_report(plan, report)}")
    except Exception as error:
        say(f"no report: {type(error).__name__}: {error}")


def say(text: str) -> None:
    """Prints on stderr, each line with the program's name: compose adds only the service's."""
    sys.stderr.write("".join(f"torchrun-compose: {line}\n" for line in text.splitlines()))
    sys.stderr.flush()


def read_token(plan: Plan) -> bytes:
    """The cluster token; b"" without one. Raises UserError."""
    if plan.token_file is None:
        if len(plan.nodes) > 1:
            say("warning: without CLUSTER_TOKEN_FILE whoever reaches CONTROL_PORT can join or stop this job")
        return b""
    try:
        token = plan.token_file.read_bytes().strip()
    except OSError as error:
        raise UserError(f"CLUSTER_TOKEN_FILE={plan.token_file} cannot be read: {error.strerror}.") from None
    if len(token) < SHORTEST_TOKEN:
        cure = "Make one with `openssl rand -hex 32` and copy it to all nodes."
        raise UserError(f"CLUSTER_TOKEN_FILE={plan.token_file} holds only {len(token)} bytes. {cure}")
    return token


def make_folders(plan: Plan) -> None:
    """The run's folder with its logs. Raises UserError."""
    try:
        plan.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"RUN_DIR={plan.run_dir} cannot be written: {error.strerror}.") from None


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
    hub = Hub(plan, token, say)
    server = await _listen(plan, hub)
    presiding = asyncio.ensure_future(hub.preside()) if server or len(plan.nodes) == 1 else None
    looks = Looks(plan)
    path, state = keep_state(plan.run_name, plan.node_rank, lambda: looks.progress)
    around = Surroundings(
        dial=_dial_inside(hub) if presiding else _dial(plan),
        launch=lambda place: _launch(plan, place),
        clean=torchrun.sweep,
        progress=lambda: looks.progress,
        stalls=lambda: looks.stalls,
        look=looks.renew,
        holder=holder,
        say=say,
        state=state,
    )
    watching = asyncio.ensure_future(traffic.watch(plan, say)) if traffic.watched(plan) else None
    member = Member(plan, token, gather(plan) if len(plan.nodes) > 1 else {}, around)
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
        torchrun.sweep()
    return verdict, own_stop


def _on_signals(act: Callable[[], object]) -> None:
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, act)


async def _listen(plan: Plan, hub: Hub) -> asyncio.Server | None:
    """Node 0's ear, on its fabric address only. None on other nodes, and where another process has the port: that one
    may be a second node 0 or another job, and will say so when this node comes as a guest."""
    if plan.node_rank or len(plan.nodes) == 1:
        return None
    try:
        return await listen(hub.serve, plan.address, plan.control_port, backlog=2 * len(plan.nodes) + 64)
    except OSError as error:
        say(f"node 0 cannot listen on {plan.address} port {plan.control_port}: {os.strerror(error.errno or 0).lower()}")
        return None


def _dial(plan: Plan) -> Callable[[], Awaitable[Wire]]:
    async def dial() -> Wire:
        own = (plan.address, 0)
        return Wire(*await asyncio.open_connection(plan.nodes[0], plan.control_port, local_addr=own, limit=MAX_LINE))

    return dial


def _dial_inside(hub: Hub) -> Callable[[], Awaitable[Wire]]:
    """Node 0 is a member of its own gang, over a pair of sockets that nobody else can reach."""
    tasks = set()

    async def dial() -> Wire:
        here, there = socket.socketpair()
        tasks.add(asyncio.ensure_future(hub.serve(*await asyncio.open_connection(sock=there, limit=MAX_LINE))))
        return Wire(*await asyncio.open_connection(sock=here, limit=MAX_LINE))

    return dial


def _launch(plan: Plan, place: Place) -> torchrun.Torchrun:
    command = torchrun.command_line(
        plan,
        node_rank=place.node_rank,
        nnodes=place.nnodes,
        master_addr=plan.master_addr,
        master_port=plan.master_port,
        run_id=place.run_id,
    )
    if place.round > 1:
        say(f"round {place.round}: node rank {place.node_rank} of {place.nnodes}")
    environment = {**torchrun.environment(plan, os.environ, run_id=place.run_id), **watched(plan)}
    return torchrun.Torchrun(command, environment, lambda outcome: keep_round(plan, place.run_id, outcome))
