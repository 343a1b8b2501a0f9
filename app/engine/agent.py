"""torchrun with an ear for its supervisor: the same program and flags, its failures told as JSON lines on a pipe.

    TORCHRUN_COMPOSE_PIPE=FD python agent.py TORCHRUN-FLAGS SCRIPT [ARGS...]

Plain torchrun ends with 0 or 1 whatever happened, says only in prose which worker died of what, and says it up to
30 s late, after it has waited for the other workers (elastic/multiprocessing/api.py `_poll`, torch 2.13). This
process is the engine itself: the one module of `launch` that imports torch, never imported by the launcher.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from traceback import walk_stack
from types import FrameType

PIPE = "TORCHRUN_COMPOSE_PIPE"
SPARE = "/tmp/torchrun-compose-error-{}"  # noqa: S108 - as in worker.py
AGAIN = 0.05
"""Seconds until a signal that came at a bad moment comes again."""


def main() -> int:
    """Runs torchrun's own main; 0, 1, or 128 + the signal that stopped it.

    Lines on the pipe: {"event": "closing"} when torchrun begins to end its workers or one has failed, and at the end
    {"event": "failed", "failures": [{"rank", "local_rank", "pid", "exitcode", "text", "time"}]}, first failure first.
    """
    pipe = int(os.environ.pop(PIPE))
    os.set_inheritable(pipe, False)
    die_with_parent()
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.run import main as torchrun

    closing = Closing(pipe)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addHandler(closing)
    postpone_signals(closing)
    try:
        torchrun(sys.argv[1:])
        return 0
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        ignore_signals()
        failures: dict[int, ProcessFailure] = error.failures
        tell(pipe, {"event": "failed", "failures": [facts(rank, failure) for rank, failure in failures.items()]})
        return 1
    except Exception as error:
        # torchrun itself, such as on a full disk.
        ignore_signals()
        itself = {"rank": -1, "exitcode": 1, "text": f"{type(error).__name__}: {error}", "time": time.time()}
        tell(pipe, {"event": "failed", "failures": [itself]})
        raise
    finally:
        ignore_signals()


def postpone_signals(closing: "Closing") -> None:
    """Lets no signal into the middle of torchrun's work on its processes.

    Its handler raises SignalException wherever Python is (elastic/multiprocessing/api.py). In the locks of subprocess
    or of a thread pool that hangs torchrun; while it ends its workers, why one had failed is lost, or the signal is,
    after seconds in which torch loads its compiler to print it (elastic/multiprocessing/tail_log.py `stop`)."""
    from torch.distributed.elastic.multiprocessing import SignalException, api

    def handle(signum: int, frame: FrameType | None) -> None:
        doing = {each.f_code.co_name for each, _ in walk_stack(frame) if each.f_code.co_filename == api.__file__}
        if closing.told or "close" in doing:
            return
        if not doing:
            raise SignalException(f"signal {signum}", signal.Signals(signum))
        signal.signal(signal.SIGALRM, lambda _, frame: handle(signum, frame))
        signal.setitimer(signal.ITIMER_REAL, AGAIN)

    # Where another torch has another name for it, all is as that torch does it.
    api._terminate_process_handler = handle


def ignore_signals() -> None:
    """For when all is over: torch's handlers would turn a late SIGTERM into a traceback from whatever runs then."""
    from torch.distributed.elastic.multiprocessing import SignalException

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM):
        with contextlib.suppress(SignalException):
            signal.signal(number, signal.SIG_IGN)
        # Python runs a handler that was due when it next can, which may have been within the call above.
        signal.signal(number, signal.SIG_IGN)


class Closing(logging.Handler):
    """Hears torchrun say that it is ending its workers, or that one has failed: that is long before it says why."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self.pipe = pipe
        self.told = False

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith(("Sending process", "failed (exitcode")):
            self.told = True
            tell(self.pipe, {"event": "closing"})


def facts(rank: int, failure: object) -> dict[str, object]:
    """One worker's failure as plain values; `text` is the exception, or "" when there is no error file."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    assert isinstance(failure, ProcessFailure)  # noqa: S101 - keeps torch's type out of the signature
    text = failure.message.get("message", "") if isinstance(failure.message, dict) else ""
    return {
        "rank": rank,
        "local_rank": failure.local_rank,
        "pid": failure.pid,
        "exitcode": failure.exitcode,
        "text": str(text) or spare(failure.pid),
        "time": failure.timestamp,
    }


def spare(pid: int) -> str:
    """What worker.py left where it could not write torch's error file."""
    path = Path(SPARE.format(pid))
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    finally:
        path.unlink(missing_ok=True)


def tell(pipe: int, event: dict[str, object]) -> None:
    os.write(pipe, json.dumps(event).encode() + b"\n")


def die_with_parent() -> None:
    """A killed launcher must not leave a training behind that nobody watches."""
    import ctypes

    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    ended = main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # All is told. Taking an interpreter with torch in it down holds up the next round by half a second.
    os._exit(ended)
