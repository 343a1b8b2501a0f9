"""What is known of one worker's failure on its own node, at once and for all nodes: its words, where, cause and fix."""

import glob
import signal

from app.engine.outcome import Explanation, Failure
from app.plan import Plan
from app.report.history import end_of_log, last_error, may_speak, read_error_file
from app.report.node_report import end_of, own_line


def examine(plan: Plan, run_id: str, failure: Failure, *, memory_kills: bool) -> Explanation:
    """Reads the worker's error file and the ends of its logs. `memory_kills`: the control group has killed for memory
    since the start. Never raises OSError."""
    from app.known_errors.catalog import CONSEQUENCE, all_errors
    from app.known_errors.diagnose import diagnose

    if failure.exitcode == -signal.SIGKILL and memory_kills:
        oom = next(each for each in all_errors() if each.id == "oom-kernel")
        return Explanation(note="the kernel killed it: out of memory", cause=oom.cause, fix=oom.fix)
    pattern = f"{glob.escape(run_id)}_*/attempt_0/{failure.local_rank}"
    folder = next(iter(plan.log_dir.glob(pattern)), plan.log_dir / "none")
    recorded = read_error_file(folder / "error.json", run_id)
    traceback = recorded.traceback if recorded else ""
    log = "\n".join(end_of(folder / f"{name}.log") for name in ("stdout", "stderr"))
    words = failure.text
    if not words and may_speak(failure.exitcode):
        words, found = last_error(log), diagnose(end_of_log(log))
    else:
        found = diagnose(f"{traceback}\n{words}") if words else None
    known = found if found and found.error.rank > CONSEQUENCE else None
    return Explanation(
        words=words,
        place=own_line(traceback),
        cause=known.error.cause if known else "",
        fix=known.error.fix if known else "",
    )
