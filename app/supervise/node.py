"""Runs one node's part of the job, from the roll call to the exit code: the one thing the entrypoint calls to run."""

import asyncio
import contextlib
import errno
import functools
import os
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.config.console import say
from app.config.errors import UserError
from app.config.exitcodes import ExitCode
from app.engine import torchrun
from app.engine.outcome import Explanation, Failure, Outcome, Stall
from app.engine.warm import Preloaded
from app.gang.agreement import gather
from app.gang.connection import Connection, Message, ProtocolError, dial, dial_inside, listen
from app.gang.coordinator import LAST_WORD, LINGER, Coordinator
from app.gang.mirror.step import QUESTION, Checkpoints
from app.gang.participant import Participant
from app.gang.services import NodeServices, RoundAssignment
from app.gang.token import read_token
from app.gang.verdict import Verdict
from app.host.ports import holder
from app.plan import Plan
from app.plan.places import results
from app.report.culprit import examine
from app.report.history import keep_left_out, keep_round
from app.report.node_report import MEMORY_KILLS, forget_report, make_report, read_counters, write_report
from app.supervise import traffic
from app.supervise.files import SIGNALS, in_time, off_loop, start_thread
from app.supervise.hang import read_ended, watched
from app.supervise.health import State
from app.supervise.progress import Progress
from app.supervise.restart_guard import forget_final, reserve_final, write_final
from app.supervise.runtime_dir import one_job, runtime_dir

MOST_FILES = 65_536
FILES = 30.0
"""Seconds that the file system of the run's folder has for one act."""
REAP_EVERY = 1.0
EXAMINE = 3.0
"""Seconds for what a failed worker has left: all nodes wait for it."""


def supervise(plan: Plan) -> int:
    """Joins the job, runs torchrun round by round, and returns the exit code (`ExitCode`).

    Raises UserError where a file or folder of the settings cannot be used."""
    token = read_token(plan)
    make_folders(plan)
    _best_effort(reserve_final)
    torchrun.adopt_orphans()
    allow_many_files()
    with one_job(plan), runtime_dir() as folder, _preloaded(plan) as preloaded:
        verdict, own_stop = asyncio.run(_take_part(plan, token, folder, preloaded))
    if verdict.code in (ExitCode.DONE, ExitCode.STOPPED):
        _best_effort(forget_final)
    if verdict.code == ExitCode.STOPPED:
        return int(verdict.code) if own_stop else plan.stopped_exit_code
    if verdict.code not in (ExitCode.DONE, ExitCode.FAILED):
        _best_effort(lambda: write_final(int(verdict.code), verdict.text))
    return int(verdict.code)


@contextlib.contextmanager
def _preloaded(plan: Plan) -> Iterator[Preloaded]:
    """What PRELOAD names begins to be loaded before the nodes meet, since that takes as long."""

    def tell(name: str, why: str) -> None:
        say(f"PRELOAD: left out {name}: {why}")
        start_thread(lambda: keep_left_out(plan, name, why), "history")

    preloaded = Preloaded(plan.script.preload, torchrun.environment(plan, os.environ, run_id=""), tell)
    try:
        preloaded.start()
        yield preloaded
    finally:
        preloaded.stop()


def _best_effort(act: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        in_time(act, FILES)


def tell_end(plan: Plan, verdict: Verdict, before: Mapping[str, int], started: float) -> None:
    """All that is written and printed of the end, but the verdict itself."""
    if verdict.code == ExitCode.DONE:
        forget_report(plan)
        say(f"results: {results(plan.script)}")
    elif verdict.code != ExitCode.STOPPED:
        tell_report(plan, verdict, before, started)


def tell_report(plan: Plan, verdict: Verdict, before: Mapping[str, int], started: float) -> None:
    """Writes this node's report, and prints where it is and what the known error in it means. Never raises: whatever is
    wrong with a report (a full disk, a bug), the verdict must be told."""
    try:
        report = make_report(plan, int(verdict.code), verdict.text, before, started)
        # What the culprit's own node knows is more than what another finds in the verdict.
        if verdict.cause or report.names_cause:
            say(f"cause: {verdict.cause or report.cause}\nfix: {verdict.fix or report.fix}")
        say(f"report written to {write_report(plan, report)}")
    except Exception as error:
        say(f"no report: {type(error).__name__}: {error}")


def make_folders(plan: Plan) -> None:
    """What the script finds when it starts: its logs' folder, CHECKPOINT_DIR, HOME. Raises UserError."""
    for path in filter(None, (plan.log_dir, plan.script.checkpoint_dir, plan.script.home)):
        try:
            in_time(functools.partial(path.mkdir, parents=True, exist_ok=True), FILES)
        except TimeoutError:
            raise UserError(f"{path} does not answer within {FILES:.0f} s: is its file server up?") from None
        except OSError as error:
            raise UserError(f"{path} cannot be made: {error.strerror}.") from None


def allow_many_files() -> None:
    """Raises the soft limit of open files as far as it goes: 1,024, Docker's usual one, is less than 1,000 nodes and
    the data loaders of one node need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def _take_part(plan: Plan, token: bytes, folder: Path, preloaded: Preloaded) -> tuple[Verdict, bool]:
    """The verdict, printed, and whether the stop came from this node's own user."""
    started, before = time.time(), read_counters()
    node = Node(plan=plan, folder=folder, preloaded=preloaded, before=before)
    coordinator = Coordinator(plan, token, say, lambda: down_link(plan.network.interface))
    server = await _listen(plan, coordinator)
    leading = asyncio.ensure_future(coordinator.run()) if server or plan.nodes.count == 1 else None
    progress = Progress(plan, folder, say, lambda: 0 if node.ending else node.engine)
    state = State(folder, lambda: progress.text)
    checkpoints = Checkpoints(plan, token, say)

    async def answer(question: str, told: Message) -> Mapping[str, object]:
        if question == QUESTION:
            try:
                return await checkpoints.answer(told)
            except ValueError as error:
                raise ProtocolError(f"checkpoints: {error}") from error
        if question == "progress":
            await progress.renew()
            return {"progress": progress.text}
        raise ProtocolError(f"unknown question {question!r}")

    services = NodeServices(
        dial=dial_inside(coordinator.serve) if leading else _dial(plan),
        answer=answer,
        launch=node.launch,
        clean=lambda: torchrun.sweep(preloaded.pid),
        progress=lambda: progress.text,
        stalls=lambda: progress.stalls,
        refresh=progress.renew,
        ended=node.ended,
        explain=node.explain,
        link=lambda: down_link(plan.network.interface),
        holder=holder,
        say=say,
        state=state.change,
    )
    # Whatever this node has before its first round is no progress of that.
    await progress.renew()
    participant = Participant(plan, token, gather(plan) if plan.nodes.count > 1 else {}, services)
    _on_signals(participant.stop)
    keeping = asyncio.ensure_future(state.keep())
    beside = [asyncio.ensure_future(each) for each in (node.reap_orphans(), _watch_traffic(plan))]
    part = asyncio.ensure_future(participant.take_part())
    try:
        # A bug in the coordinator must end the job with its traceback, not leave it waiting for a verdict.
        await asyncio.wait([part, leading] if leading else [part], return_when=asyncio.FIRST_COMPLETED)
        if leading and leading.done():
            leading.result()
        verdict = await part
        own_stop = participant.stops > 0
        for each in beside:
            # From here on the report may start programs of its own.
            each.cancel()
        if leading:
            # Why this node's participant left by itself, the coordinator does not know.
            coordinator.conclude(verdict)
        try:
            await off_loop(lambda: tell_end(plan, verdict, before, started), FILES)
        except OSError:
            say(f"no report: RUN_DIR={plan.script.run_dir} does not answer")
        # The last line is what people read first. Node 0 may stay for a while to tell others.
        say(verdict.text)
        if leading and participant.stops < 2:
            _on_signals(leading.cancel)
            await asyncio.wait([leading], timeout=LINGER + 2 * LAST_WORD)
    finally:
        # The loop takes its handlers with it, and a signal now must not change the exit code.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        part.cancel()
        checkpoints.stop()
        for each in (keeping, *beside):
            each.cancel()
        if leading:
            leading.cancel()
        if server:
            server.close()
        preloaded.stop()
        torchrun.sweep()
    return verdict, own_stop


async def _watch_traffic(plan: Plan) -> None:
    if traffic.watched(plan):
        await traffic.watch(plan, say)


def down_link(interface: str, root: Path = Path("/")) -> str:
    """Says that an interface has no link; "" where it has one, or where that is unknown."""
    try:
        carrier = (root / "sys/class/net" / interface / "carrier").read_text().strip()
    except OSError as error:
        # The file of an interface that is switched off cannot be read.
        return f"its link {interface} is down" if error.errno == errno.EINVAL else ""
    return f"its link {interface} is down" if carrier == "0" else ""


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
    return functools.partial(dial, plan.network.address, plan.nodes.addresses[0], plan.network.control_port)


@dataclass(slots=True, kw_only=True)
class Node:
    """What this launcher has started, round after round."""

    plan: Plan
    folder: Path
    preloaded: Preloaded
    before: Mapping[str, int]
    """The machine's counters at the start."""
    last: torchrun.Torchrun | None = None

    @property
    def engine(self) -> int:
        """The process id of the last torchrun, 0 before."""
        return self.last.process.pid if self.last else 0

    @property
    def ending(self) -> bool:
        return self.last is not None and self.last.told_to_end

    def launch(self, assignment: RoundAssignment) -> torchrun.Torchrun:
        plan = self.plan
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
        environment = torchrun.environment(plan, os.environ, run_id=assignment.run_id)
        environment |= watched(plan, self.folder)
        keep = functools.partial(self._keep, assignment.run_id)
        self.last = torchrun.Torchrun(command, environment, keep, self.preloaded)
        return self.last

    async def ended(self) -> Sequence[Stall]:
        with contextlib.suppress(OSError, TimeoutError):
            return await off_loop(lambda: read_ended(self.folder), EXAMINE)
        return ()

    async def explain(self, run_id: str, failure: Failure) -> Explanation:
        with contextlib.suppress(OSError, TimeoutError):
            return await off_loop(functools.partial(self._examine, run_id, failure), EXAMINE)
        return Explanation(words=failure.text)

    def _examine(self, run_id: str, failure: Failure) -> Explanation:
        kills = read_counters().get(MEMORY_KILLS, 0) > self.before.get(MEMORY_KILLS, 0)
        return examine(self.plan, run_id, failure, memory_kills=kills)

    def _keep(self, run_id: str, outcome: Outcome) -> None:
        start_thread(lambda: keep_round(self.plan, run_id, outcome), "history")

    async def reap_orphans(self) -> None:
        """What init does for processes whose parent has ended: they are this launcher's meanwhile (adopt_orphans)."""
        while True:
            await asyncio.sleep(REAP_EVERY)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                    if ended.si_pid in (self.engine, self.preloaded.pid):
                        # Whoever started it asks for its exit code.
                        break
                    os.waitpid(ended.si_pid, 0)
