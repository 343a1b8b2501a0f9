"""torch's elastic agent as it is, but for its worker processes: how they begin, and when their end is told.

Imported by agent.py alone, in a process that has torch. torchrun's own `main` runs unchanged and makes its worker
processes by the classes here, subclasses of torch's.
"""

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic import multiprocessing
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    RunProcsResult,
    SignalException,
    Std,
    SubprocessContext,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import handlers
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from torch.distributed.launcher import api as launcher
from torch.distributed.run import main as torchrun

from app.engine import torch_private, warm
from app.engine.output import OwnLines, in_pipes
from app.engine.warm import Forked, PreloadConnection

Tell = Callable[[dict[str, object]], None]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Those that torch handles."""
WORKER = Path(__file__).resolve().with_name("worker.py")
LONGEST = 4096
"""Characters of an error that are told: the missing keys of a checkpoint may be megabytes."""
UNTIL_ALL_HAVE_ENDED = 1e7
"""Seconds for which a node whose ranks are done waits for the others. After torch's 300 it prints a traceback and ends,
and with node 0 ends the store; who is lost meanwhile or hangs is the launcher's concern."""


def run(arguments: list[str], grace: int | None, tell: Tell, server: int | None) -> int:
    """Runs torchrun; 0, 1, or 128 + the signal that stopped it. `grace` is the seconds that its workers get to end."""
    signals, own_lines = Signals(), OwnLines()
    if not torch_private.missing(torch_private.ENGINE):
        context: Any = partial(Workers, signals=signals, grace=grace, tell=tell, own_lines=own_lines)
        # Functions that return what the classes do: they are only called.
        multiprocessing.SubprocessContext = context  # type: ignore[misc]
        agent: Any = partial(LocalElasticAgent, exit_barrier_timeout=UNTIL_ALL_HAVE_ENDED)
        launcher.LocalElasticAgent = agent  # type: ignore[attr-defined]
        if server is not None:
            handler: Any = partial(Handler, preloaded=PreloadConnection(socket.socket(fileno=server)))
            handlers.SubprocessHandler = handler  # type: ignore[attr-defined]
    try:
        torchrun(arguments)
        return 0
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        signals.ignore()
        failures: dict[int, ProcessFailure] = error.failures
        tell({"event": "failed", "failures": [facts(rank, failure) for rank, failure in failures.items()]})
        return 1
    except Exception as error:
        # torchrun itself, such as on a full disk.
        signals.ignore()
        itself = {"rank": -1, "exitcode": 1, "text": f"{type(error).__name__}: {error}"[:LONGEST], "time": time.time()}
        tell({"event": "failed", "failures": [itself]})
        raise
    finally:
        signals.ignore()
        own_lines.close()


class Signals:
    """Lets no signal into the middle of torch's work on its processes.

    torch's handler raises SignalException wherever Python is (elastic/multiprocessing/api.py). In the locks of
    subprocess or of a thread pool that hangs torchrun; while it ends its workers, why one had failed is lost, or the
    signal is, after seconds in which torch loads its compiler to print it (elastic/multiprocessing/tail_log.py `stop`).
    """

    def __init__(self) -> None:
        self.deaf = False
        """The workers are being ended: a signal could only spoil that."""
        self.failed: Callable[[], bool] = lambda: False
        """Whether a worker has failed already, which torch sees at its next look: a signal must not hide why."""
        self._held = False
        self._waiting: signal.Signals | None = None

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals that come meanwhile count as come afterwards."""
        if self._held:
            yield
            return
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting and not self.deaf:
            self._stop(self._waiting)

    def ignore(self) -> None:
        """For when all is over: a late SIGTERM would become a traceback from whatever runs then."""
        self.deaf = True
        for number in SIGNALS:
            with contextlib.suppress(SignalException):
                signal.signal(number, signal.SIG_IGN)
            # Python runs a handler that was due when it next can, which may have been within the call above.
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._held:
            self._waiting = signal.Signals(number)
        elif not self.deaf:
            self._stop(signal.Signals(number))

    def _stop(self, number: signal.Signals) -> None:
        if self.failed():
            return
        raise SignalException(f"signal {number}", number)


class Workers(SubprocessContext):
    """The workers of one node; tells when all have begun, and when torch begins to end them or one has failed, which is
    up to `grace` seconds before it says why."""

    def __init__(
        self,
        *,
        signals: Signals,
        grace: int | None,
        tell: Tell,
        own_lines: OwnLines,
        **rest: Any,  # noqa: ANN401
    ) -> None:
        # From here on the descriptor is the ranks', whose lines are looked at before.
        own_lines.close()
        try:
            super().__init__(**rest)
        except OSError:
            # No room for the folders of this round's logs.
            rest["logs_specs"] = DefaultLogsSpecs(log_dir=tempfile.mkdtemp(), tee=Std.ALL)
            super().__init__(**rest)
        self._signals, self._grace, self._tell = signals, grace, tell
        outputs = in_pipes(self.stdouts, self.stderrs, rest.get("log_line_prefixes") or {})
        self.stdouts, self.stderrs = (each.paths() for each in outputs)
        if hasattr(self, "_tail_logs"):
            self._tail_logs: Any = outputs
        else:
            # As torch 2.8 has them. Without this the workers' output would be read by nobody.
            self._stdout_tail, self._stderr_tail = outputs

    def _start(self) -> None:
        # torch has just installed its own handlers, before any process that they could hurt.
        self._signals.install()
        self._signals.failed = lambda: any(each.proc.poll() for each in self.subprocess_handlers.values())
        with self._signals.held():
            super()._start()  # type: ignore[no-untyped-call]  # as torch has it
            # With these ends open here, a pipe would outlive its worker.
            for worker in self.subprocess_handlers.values():
                for end in filter(None, (worker._stdout, worker._stderr)):
                    end.close()
        self._tell({"event": "begun", "time": time.time()})

    def _poll(self) -> RunProcsResult | None:
        with self._signals.held():
            result = super()._poll()
            if result and not result.is_failed():
                self._tell({"event": "finished"})
            return result

    def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
        processes = [each.proc for each in self.subprocess_handlers.values()]
        if not self._signals.deaf and any(each.poll() != 0 for each in processes):
            self._signals.deaf = True
            died = [each.ended for each in processes if isinstance(each, Forked) and each.poll()]
            self._tell({"event": "closing", "died": min(died, default=0.0)})
        # torchrun takes --shutdown-timeout from torch 2.12 on; here every torch does.
        super()._close(death_sig, timeout if self._grace is None else self._grace)


class Handler(SubprocessHandler):
    """One worker: forked from the preloaded process if it is a script in this Python, and as torch does it if not."""

    def __init__(self, *args: Any, preloaded: PreloadConnection, **rest: Any) -> None:  # noqa: ANN401
        self._preloaded = preloaded
        super().__init__(*args, **rest)

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:  # noqa: ANN401
        if args[:2] != (sys.executable, "-u") or Path(args[2]).resolve() != WORKER:
            return super()._popen(args, env)
        outputs = [each.fileno() if each else number for number, each in ((1, self._stdout), (2, self._stderr))]
        process = self._preloaded.fork(warm.WORKER, args[3:], env, [0, *outputs])
        while process.poll() is None and not process.pid:
            self._preloaded.pause(warm.STEP)
        if process.error:
            raise process.error
        return process


def facts(rank: int, failure: ProcessFailure) -> dict[str, object]:
    """One worker's failure as plain values; `text` is the exception, or "" when there is no error file."""
    text = failure.message.get("message", "") if isinstance(failure.message, dict) else ""
    return {
        "rank": rank,
        "local_rank": failure.local_rank,
        "pid": failure.pid,
        "exitcode": failure.exitcode,
        "text": (str(text) or spare(failure.pid))[:LONGEST],
        "time": failure.timestamp,
    }


def spare(pid: int) -> str:
    """What worker.py left where it could not write torch's error file."""
    path = Path(os.environ.get("TORCHRUN_COMPOSE_STALLS", "").partition(":")[2], f"error-{pid}")
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    finally:
        path.unlink(missing_ok=True)
