"""torchrun as the launcher's child: the same program and flags; reports worker failures as JSON lines on a pipe.

    TORCHRUN_COMPOSE_PIPE=FD python -P agent.py [--shutdown-timeout=SECONDS] TORCHRUN-FLAGS SCRIPT [ARGS...]

Plain torchrun ends with 0 or 1 whatever happened, says only in prose which worker died of what, and says it up to
30 s late, after it has waited for the other workers (elastic/multiprocessing/api.py `_poll`, torch 2.13). This
process is the engine itself: the launcher never imports it.
"""

import json
import os
import signal
import sys
from pathlib import Path

PIPE = "TORCHRUN_COMPOSE_PIPE"
GRACE = "--shutdown-timeout="


def main(arguments: list[str], pipe: int, server: int | None = None) -> int:
    """Runs torchrun's own main; 0, 1, or 128 + the signal that stopped it. `server` is the descriptor of a socket to
    the preloaded process, if this process was forked from it.

    Lines on the pipe: {"event": "begun", "time"} when all workers run, {"event": "closing", "died"} when torchrun
    begins to end them or one has failed, or {"event": "finished"} when all of them have ended with 0; and at the end of
    those that failed {"event": "failed", "failures": [{"rank", "local_rank", "pid", "exitcode", "text", "time"}]},
    first failure first.
    """
    os.set_inheritable(pipe, False)
    # As `python -P` leaves it, with this project before whatever a user's PYTHONPATH calls `app`.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from app.engine import elastic

    grace = None
    if arguments[0].startswith(GRACE):
        grace, arguments = int(arguments[0].removeprefix(GRACE)), arguments[1:]
    return elastic.run(arguments, grace, lambda event: tell(pipe, event), server)


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


def leave(code: int) -> None:
    """All is told. Taking an interpreter with torch in it down holds up the next round by half a second."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    die_with_parent()
    leave(main(sys.argv[1:], int(os.environ.pop(PIPE))))
