"""Runs one node's part of the job, from the roll call to the exit code: the one thing the entrypoint calls to run."""

import asyncio
import contextlib
import errno
import functools
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from app.config.console import say
from app.config.errors import UserError
from app.config.exitcodes import ExitCode
from app.config.redaction import redact
from app.engine import torchrun
from app.engine.command import command_line, environment
from app.engine.outcome import Explanation, Failure, Outcome, Stall
from app.engine.warm import Preloaded
from app.gang.agreement import gather
from app.gang.connection import Connection, Message, ProtocolError, dial, dial_inside, listen
from app.gang.coordinator import LAST_WORD, LINGER, Coordinator
from app.gang.messages import JobEvent
from app.gang.mirror.step import QUESTION, Checkpoints
from app.gang.participant import Participant
from app.gang.services import NodeServices, RoundAssignment
from app.gang.token import read_token
from app.gang.verdict import Verdict
from app.host.accelerators import used_memory
from app.host.ports import holder
from app.plan import Plan
from app.plan.places import results
from app.report.culprit import examine
from app.report.history import forget_restarts, keep_restart, keep_round, restart_in_words
from app.report.node_report import MEMORY_KILLS, forget_report, make_report, read_counters, write_report
from app.supervise import prometheus, traffic
from app.supervise.files import in_time, off_loop, start_thread
from app.supervise.gpu_memory import ANSWER, until_free
from app.supervise.hang import read_ended, watched
from app.supervise.notify import Notifier
from app.supervise.preloading import SIGNALS
from app.supervise.progress import TrainingProgress
from app.supervise.restart_guard import forget_final, reserve_final, write_final
from app.supervise.restarts import MARKS, follow, marks_file
from app.supervise.runtime_dir import one_job, runtime_dir
from app.supervise.state import NodeState

Clean = Callable[[str], str]
FILES = 30.0
"""Seconds that the file system of the run's folder has for one act."""
REAP_EVERY = 1.0
EXAMINE = 3.0
"""Seconds for what a failed worker has left: all nodes wait for it."""


def supervise(plan: Plan, preloaded: Preloaded, secrets: Sequence[str] = ()) -> int:
    """Joins the job, runs torchrun round by round, and returns the exit code (`ExitCode`). The `secrets` are told to
    nobody.

    Raises UserError where a file or folder of the settings cannot be used."""
    token = read_token(plan)
    make_folders(plan)
    _best_effort(reserve_final)
    _best_effort(lambda: forget_restarts(plan))
    torchrun.adopt_orphans()
    clean = functools.partial(redact, secrets=secrets)
    with one_job(plan), runtime_dir() as folder:
        node = Node(plan=plan, folder=folder, preloaded=preloaded, before=read_counters(), clean=clean)
        verdict, own_stop = asyncio.run(_take_part(node, token))
    if verdict.code in (ExitCode.DONE, ExitCode.STOPPED):
        _best_effort(forget_final)
    if verdict.code == ExitCode.STOPPED:
        return int(verdict.code) if own_stop else plan.stopped_exit_code
    if verdict.code not in (ExitCode.DONE, ExitCode.FAILED):
        _best_effort(lambda: write_final(int(verdict.code), verdict.text))
    return int(verdict.code)


def _best_effort(act: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        in_time(act, FILES)


def tell_end(node: "Node", verdict: Verdict, started: float) -> None:
    """All that is written and printed of the end, but the verdict itself."""
    plan = node.plan
    if verdict.code == ExitCode.DONE:
        forget_report(plan)
        say(f"results: {results(plan.script)}")
    elif verdict.code != ExitCode.STOPPED:
        tell_report(plan, verdict, node.before, started, node.clean)


def tell_report(plan: Plan, verdict: Verdict, before: Mapping[str, int], started: float, clean: Clean = redact) -> None:
    """Writes this node's report, and prints where it is and what the known error in it means. Never raises: whatever is
    wrong with a report (a full disk, a bug), the verdict must be told."""
    try:
        report = make_report(plan, int(verdict.code), verdict.text, before, started)
        # What the culprit's own node knows is more than what another finds in the verdict.
        if verdict.cause or report.names_cause:
            say(clean(f"cause: {verdict.cause or report.cause}\nfix: {verdict.fix or report.fix}"))
        say(f"report written to {write_report(plan, report)}")
    except Exception as error:
        say(clean(f"no report: {type(error).__name__}: {error}"))


def make_folders(plan: Plan) -> None:
    """What the script finds when it starts: its logs' folder, CHECKPOINT_DIR, HOME. Raises UserError."""
    home = plan.script.home
    for path in filter(None, (plan.log_dir, plan.script.checkpoint_dir, home)):
        make = functools.partial(path.mkdir, parents=True, exist_ok=True)
        try:
            in_time(functools.partial(make_home, path) if path == home else make, FILES)
        except TimeoutError:
            raise UserError(f"{path} does not answer within {FILES:.0f} s: is its file server up?") from None
        except OSError as error:
            raise UserError(f"{path} cannot be made: {error.strerror}.") from None


def make_home(home: Path) -> None:
    """Of this user alone: what lies there is run. Others make theirs beside it. Raises OSError."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        home.parent.chmod(0o1777)
    home.mkdir(0o700, exist_ok=True)
    if (owner := home.lstat().st_uid) != os.geteuid():
        say(f"warning: HOME={home} belongs to user {owner}, whose compiled code this job would run. Set HOME")


async def _take_part(node: "Node", token: bytes) -> tuple[Verdict, bool]:
    """The verdict, printed, and whether the stop came from this node's own user."""
    started, plan, preloaded = time.time(), node.plan, node.preloaded
    try:
        facts = await off_loop(lambda: gather(plan), FILES) if plan.nodes.count > 1 else {}
    except TimeoutError:
        raise UserError(f"The script's files do not answer within {FILES:.0f} s: is their file server up?") from None
    coordinator = Coordinator(plan, token, say, lambda: down_link(plan.network.interface))
    server = await _listen(plan, coordinator)
    leading = asyncio.ensure_future(coordinator.run()) if server or plan.nodes.count == 1 else None
    progress = TrainingProgress(plan, node.folder, say, lambda: 0 if node.ending else node.engine)
    notifier = Notifier(plan, node.clean, say) if plan.monitoring.notify else None
    state = NodeState(
        plan, node.folder, lambda: progress.gained, lambda: trips(coordinator, participant), lambda: node.ranks
    )
    checkpoints = Checkpoints(plan, token, say)

    def take(event: JobEvent) -> None:
        state.take(event)
        if notifier:
            notifier.take(event)

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
        clean=node.sweep,
        released=node.released,
        progress=lambda: progress.text,
        stalls=lambda: [replace(stall, at=node.clean(stall.at)) for stall in progress.stalls],
        refresh=progress.renew,
        ended=node.ended,
        explain=node.explain,
        link=lambda: down_link(plan.network.interface),
        holder=holder,
        say=say,
        event=take,
        told=lambda: notifier is not None and notifier.told,
        state=state.change,
    )
    # Whatever this node has before its first round is no progress of that.
    await progress.renew()
    with contextlib.suppress(OSError):
        node.memory = await off_loop(node.measure, ANSWER)
    facts = {name: node.clean(value) for name, value in facts.items()}
    participant = Participant(plan, token, facts, services)
    _on_signals(participant.stop)
    if plan.monitoring.metrics:
        labels = {"run": plan.run_name, "node": str(plan.nodes.rank)}
        prometheus.serve(*plan.monitoring.metrics, lambda: state.record, labels, say)
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
            await off_loop(lambda: tell_end(node, verdict, started), FILES)
        except OSError:
            say(f"no report: RUN_DIR={plan.script.run_dir} does not answer")
        # The last line is what people read first. Node 0 may stay for a while to tell others.
        say(verdict.text)
        if leading and participant.stops < 2:
            _on_signals(leading.cancel)
            await asyncio.wait([leading], timeout=LINGER + 2 * LAST_WORD)
        if notifier and participant.stops < 2:
            await notifier.finish(verdict)
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
        with contextlib.suppress(OSError):
            await traffic.watch(plan, say)


def trips(coordinator: Coordinator, participant: Participant) -> Mapping[int, float | None]:
    """As in state.py: node 0 knows all nodes, the others know node 0."""
    if participant.plan.nodes.rank:
        return {0: participant.trip if participant.connected else None}
    nodes = coordinator.membership.all()
    return {rank: nodes[rank].trip if rank in nodes else None for rank in range(participant.plan.nodes.count)}


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
    clean: Clean
    """Removes secrets from what is printed here or told to other nodes."""
    last: torchrun.Torchrun | None = None
    ranks: range = range(0)
    """Of the last round, on this node."""
    memory: Mapping[int, int] = field(default_factory=dict)
    """MiB in use of each GPU before the job, where it uses any."""
    over: threading.Event = field(default_factory=threading.Event)
    """Of the last torchrun."""

    @property
    def engine(self) -> int:
        """The process id of the last torchrun, 0 before."""
        return self.last.process.pid if self.last else 0

    @property
    def ending(self) -> bool:
        return self.last is not None and self.last.told_to_end

    def launch(self, assignment: RoundAssignment) -> torchrun.Torchrun:
        plan = self.plan
        command = command_line(
            plan,
            node_rank=assignment.node_rank,
            nnodes=assignment.nnodes,
            master_addr=plan.network.master_addr,
            master_port=plan.network.master_port,
            run_id=assignment.run_id,
        )
        first = assignment.node_rank * plan.workers.nproc
        self.ranks = range(first, first + plan.workers.nproc)
        if assignment.round > 1:
            say(f"round {assignment.round}: node rank {assignment.node_rank} of {assignment.nnodes}")
        marks, before, self.over = marks_file(self.folder, assignment.run_id), self.last, threading.Event()
        environ = environment(plan, os.environ, run_id=assignment.run_id) | watched(plan, self.folder)
        environ[MARKS] = str(marks)
        keep = functools.partial(self._keep, assignment.run_id)
        self.last = torchrun.Torchrun(command, environ, keep, self.preloaded)
        if before:
            tell = functools.partial(self._tell_restart, assignment, debug=environ.get("LOGLEVEL", "") == "DEBUG")
            watch = functools.partial(follow, before.moments, self.last.moments, marks, self.over, tell)
            start_thread(watch, "restart")
        return self.last

    def sweep(self) -> int:
        left = torchrun.sweep(self.preloaded.pid)
        self.over.set()
        return left

    async def released(self) -> None:
        await until_free(self.memory, self.measure, say)
        if self.last:
            self.last.moments.ended = time.time()

    def measure(self) -> Mapping[int, int]:
        return used_memory(environment(self.plan, os.environ, run_id="")) if self.plan.workers.backend == "nccl" else {}

    def _tell_restart(self, assignment: RoundAssignment, parts: Mapping[str, float], *, debug: bool) -> None:
        keep_restart(self.plan, assignment.run_id, parts)
        if debug:
            say(f"round {assignment.round}: {restart_in_words(parts)}")

    async def ended(self) -> Sequence[Stall]:
        with contextlib.suppress(OSError, TimeoutError):
            return await off_loop(lambda: read_ended(self.folder), EXAMINE)
        return ()

    async def explain(self, run_id: str, failure: Failure) -> Explanation:
        found = Explanation(words=failure.text)
        with contextlib.suppress(OSError, TimeoutError):
            found = await off_loop(functools.partial(self._examine, run_id, failure), EXAMINE)
        return replace(found, **{name: self.clean(text) for name, text in asdict(found).items()})

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
