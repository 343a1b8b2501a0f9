"""The process that has torch loaded, once for a job: each round's agent and its workers are forked from it.

    python -u preload.py SOCKET LIMIT CORE-MODULES MODULES        seconds; modules with commas between them

It loads the modules, CUDA never among what they may initialise, and then forks whatever warm.py asks for over a socket.
A forked child becomes what a fresh `python -u worker.py SCRIPT` would be: nothing of this process may show in it. Where
that cannot be promised the child starts that command instead.

Not multiprocessing's fork server, whose children are multiprocessing's own: with a parent, a name, a start method and
a key to share, with descriptors of it open, without -u, and with exit handlers of theirs left out. It also takes its
environment from the launcher's own, survives only an ImportError of a module, and cannot tell which one that was.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any, NoReturn

AGENT, WORKER = b"a", b"w"
"""What to fork."""
FOLDER = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - as in worker.py
PER_RANK = re.compile(
    "(|LOCAL_|GROUP_|ROLE_)(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCH_NCCL_ASYNC_ERROR_HANDLING"
    "|(TORCHELASTIC|TORCHRUN_COMPOSE)_.*"
)
"""What torchrun and we add to a worker's environment: no library reads it while it is loaded."""
THREAD_ENDS = 1.0
"""Seconds in which a thread that a module has started and ended must be gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What this process, a forked child now, has to become."""

    kind: bytes
    arguments: Sequence[str]
    environ: Mapping[str, str]
    cpus: Sequence[int]
    descriptors: Sequence[int]
    """To stay open, besides 0 to 2."""


def main(control: socket.socket, limit: float, core: list[str], extra: list[str]) -> Task:
    """Loads and serves; returns in forked children only. A module of `extra` that takes longer than `limit` ends this
    process by SIGALRM, since native code may hold the GIL; the next one is started without that module."""
    begun, environ = time.monotonic(), dict(os.environ)
    # Collecting now would only touch what is to stay; the children share what is frozen.
    gc.disable()
    for name in core + extra:
        tell(control, "loading", name)
        with limited(limit if name in extra else 0):
            failed = load(name)
        left_behind = unfit()
        if failed or left_behind:
            tell(control, "left out", name, failed or left_behind)
            if name in core:
                os._exit(1)
        if left_behind:
            left = ",".join(each for each in extra if each != name)
            os.set_inheritable(control.fileno(), True)
            again = [sys.executable, "-u", __file__, str(control.fileno()), str(limit), ",".join(core), left]
            os.execve(sys.executable, again, environ)  # noqa: S606
    gc.collect()
    gc.freeze()
    gc.enable()
    tell(control, "ready", time.monotonic() - begun)
    task = PreloadServer(control).serve()
    become(task, environ)
    return task


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends this process by SIGALRM after so many seconds within; 0 for never."""
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load(name: str) -> str:
    """Why it could not be imported; "" if it was."""
    try:
        importlib.import_module(name)
    except BaseException as error:  # Whatever a module does must not end the rounds that could go on without it.
        return f"{type(error).__name__}: {error}".partition("\n")[0][:300]
    return ""


def unfit() -> str:
    """Why children of this process would be unlike a fresh one; "" if they would not."""
    if cuda_in_use():
        return "it initialises CUDA, which no forked process can use"
    if threads() > 1:
        # OpenBLAS ends its threads before a fork, and has them again when they are needed.
        if not (child := os.fork()):
            os._exit(0)
        os.waitpid(child, 0)
    until = time.monotonic() + THREAD_ENDS
    while (count := threads()) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    return f"it leaves {count - 1} threads running, which no forked process has" if count > 1 else ""


def threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


def cuda_in_use() -> bool:
    cuda = sys.modules.get("torch.cuda")
    return bool(cuda and cuda.is_initialized())


class PreloadServer:
    """Forks what is asked for over sockets: the launcher's, and one for each agent.

    Answers with ["started", pid], ["refused", errno], and ["ended", pid, exit code, time]. When an asker is gone its
    children are killed; when the launcher is, this process ends, and with it (PR_SET_PDEATHSIG) all of its children."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.askers = {control.fileno(): control}
        self.children: dict[int, socket.socket] = {}
        self.wake, self.awake = os.pipe()

    def serve(self) -> Task:
        for end in (self.wake, self.awake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self.awake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        while True:
            poll = select.poll()
            for descriptor in (self.wake, *self.askers):
                poll.register(descriptor, select.POLLIN)
            for descriptor, _ in poll.poll():
                if descriptor == self.wake:
                    self._reap()
                elif task := self._answer(self.askers[descriptor]):
                    return task

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if asker := self.children.pop(ended[0], None):
                    tell(asker, "ended", ended[0], os.waitstatus_to_exitcode(ended[1]), time.time())

    def _answer(self, asker: socket.socket) -> Task | None:
        """Forks what `asker` asks for; a task in the child alone."""
        try:
            kind, descriptors, _, _ = socket.recv_fds(asker, 1, 8)
        except ConnectionResetError:
            kind, descriptors = b"", []
        if not kind:
            self._forget(asker)
            return None
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) if kind == AGENT else ()
        server = os.getpid()
        try:
            child = os.fork()
        except OSError as error:
            tell(asker, "refused", error.errno)
            child = -1
        if not child:
            return self._child(server, asker, kind, descriptors, pair)
        if child > 0:
            self.children[child] = asker
            for own in pair[:1]:
                self.askers[own.fileno()] = own
        for each in (*descriptors, *(theirs.detach() for theirs in pair[1:])):
            os.close(each)
        return None

    def _forget(self, asker: socket.socket) -> None:
        if asker is self.control:
            os._exit(0)
        del self.askers[asker.fileno()]
        for child in [child for child, owner in self.children.items() if owner is asker]:
            os.kill(child, signal.SIGKILL)
        # Answers to it go nowhere.
        asker.shutdown(socket.SHUT_RDWR)

    def _child(
        self, server: int, asker: socket.socket, kind: bytes, received: list[int], pair: Sequence[socket.socket]
    ) -> Task:
        os.setsid()
        die_with(server)
        signal.set_wakeup_fd(-1)
        # From here on it has a group of its own that can be signalled.
        tell(asker, "started", os.getpid())
        request, stdin, stdout, stderr, *others = received
        for number, descriptor in enumerate((stdin, stdout, stderr)):
            os.dup2(descriptor, number)
        with os.fdopen(request, "rb") as file:
            file.seek(0)
            asked: dict[str, Any] = json.load(file)
        for each in {*self.askers.values(), *self.children.values(), *pair[:1]}:
            each.close()
        for descriptor in (stdin, stdout, stderr, self.wake, self.awake):
            os.close(descriptor)
        return Task(
            kind=kind,
            arguments=asked["arguments"],
            environ=asked["environ"],
            cpus=asked["cpus"],
            descriptors=[*others, *(theirs.detach() for theirs in pair[1:])],
        )


def become(task: Task, before: Mapping[str, str]) -> None:
    """Makes this forked process what a fresh one of that task is, or starts a fresh one in its place."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if {*task.cpus} != os.sched_getaffinity(0):
        os.sched_setaffinity(0, task.cpus)
    if task.kind == WORKER and (unlike(task.environ, before) or shadowed(task.arguments)):
        start_fresh(task)
    by_modules = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ.clear()
    os.environ.update({**task.environ, **by_modules})
    reseed()
    importlib.invalidate_caches()
    script = os.path.join(FOLDER, "worker.py" if task.kind == WORKER else "agent.py")  # noqa: PTH118
    sys.argv = [script, *task.arguments]
    sys.orig_argv = [sys.executable, "-u", *sys.argv]
    if task.kind == WORKER and not sys.flags.safe_path:
        sys.path.insert(0, FOLDER)


def unlike(environ: Mapping[str, str], before: Mapping[str, str]) -> bool:
    """Whether a library that was loaded under `before` may have read what `environ` has otherwise."""
    differing = {name for name in {*environ, *before} if environ.get(name) != before.get(name)}
    return not all(PER_RANK.fullmatch(name) for name in differing)


def shadowed(arguments: Sequence[str]) -> bool:
    """Whether a file beside the script has the name of a module that is loaded: the script means its own."""
    if sys.flags.safe_path:
        return False
    folder = "." if arguments[0] == "-m" else os.path.dirname(os.path.realpath(arguments[0]))  # noqa: PTH120
    origins = {name: getattr(module.__spec__, "origin", "") for name, module in sys.modules.items() if "." not in name}
    # The rest a fresh interpreter has loaded too, before it looks beside the script.
    loaded = {name for name, origin in origins.items() if origin not in ("built-in", "frozen")}
    with contextlib.suppress(OSError):
        return any(
            entry.name.partition(".")[0] in loaded
            and (entry.name.endswith((".py", ".so", ".pyc")) or os.path.exists(f"{entry.path}/__init__.py"))  # noqa: PTH110
            for entry in os.scandir(folder)
        )
    return False


def start_fresh(task: Task) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        # As subprocess does: Python ignores them.
        signal.signal(number, signal.SIG_DFL)
    worker = os.path.join(FOLDER, "worker.py")  # noqa: PTH118
    os.execve(sys.executable, [sys.executable, "-u", worker, *task.arguments], {**task.environ})  # noqa: S606


def reseed() -> None:
    """Gives the process its own randomness where a library drew it when it was loaded; `random` does so by itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        # Not torch.seed(), which gives GPUs another seed than their default.
        sys.modules["torch"].default_generator.seed()
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)


def entitle(title: str) -> None:
    """For ps, top and nvidia-smi; without setproctitle they show the command line of this file."""
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle

        setproctitle(title)


def die_with(parent: int) -> None:
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def tell(asker: socket.socket, *words: object) -> None:
    # Who asked may be gone.
    with contextlib.suppress(OSError):
        asker.send(json.dumps(words).encode())


def beside(name: str) -> ModuleType:
    """A file of this folder as a module that no script finds by its name."""
    spec = spec_from_file_location(f"torchrun_compose_{name}", os.path.join(FOLDER, f"{name}.py"))  # noqa: PTH118
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018 - the file is there
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]
    die_with(os.getppid())
    worker = beside("worker")
    exit_code = list[int]()
    # First, so that in a worker it comes last.
    atexit.register(worker.leave, exit_code)
    entitle("torchrun-compose: preloaded")
    task = main(
        socket.socket(fileno=int(sys.argv[1])),
        float(sys.argv[2]),
        sys.argv[3].split(","),
        sys.argv[4].split(",") if sys.argv[4] else [],
    )
    # Nothing of this file is on the stack below a script, but this line where it would have one of worker.py.
    if task.kind == WORKER:
        entitle(f"rank{task.environ.get('RANK', '')} {' '.join(task.arguments)}")
        worker.main(exit_code)
    entitle("torchrun-compose: torchrun")
    sys.path.insert(0, os.path.dirname(os.path.dirname(FOLDER)))  # noqa: PTH120
    from app.engine import agent

    pipe, server = task.descriptors
    agent.leave(agent.main(sys.argv[1:], pipe, server))
