"""What ended a round, and which of many failures was the first cause."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from signal import SIGABRT, SIGKILL, SIGTERM, Signals

from app.config.exitcodes import ExitCode
from app.gang.messages import Report
from app.known_errors.consequences import is_consequence

BROKEN = re.compile(r"(ModuleNotFoundError|ImportError|SyntaxError|IndentationError|TabError): ")
REFUSED = "It ended as scripts do that refuse their arguments: see its own message, and correct TRAIN_ARGS"
UNFIT = "The script cannot start like this: correct it, TRAIN_SCRIPT or the image"
USAGE = 2
"""The exit code of argparse, and of app.train, for wrong settings."""
HEAD_START = 3.0
"""Seconds by which a lost node or a signal may come after the errors it caused: they are found by polling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How the job ended, the same on all nodes."""

    code: ExitCode
    text: str


class Final(Exception):  # noqa: N818 - an end, not always an error
    """The job ends here."""

    def __init__(self, code: ExitCode, text: str) -> None:
        super().__init__(text)
        self.verdict = Verdict(code=code, text=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """One node's part in the end of a round."""

    node: str
    """As shown: "node 1 (192.168.5.229)"."""
    what: str
    seen: float
    """Monotonic seconds of node 0, when the first sign of it came in."""
    clock: float = 0.0
    """Seconds since the epoch on the failing node; 0 where it could not tell."""
    code: ExitCode = ExitCode.TRAINING
    sudden: bool = False
    """A lost node or a signal: a cause that nobody else's error explains."""
    cascade: bool = False
    """Explained by another node's trouble."""
    hopeless: str = ""
    """What the user must change, where another try would end the same way."""


def first_cause(troubles: Sequence[Trouble]) -> Trouble:
    """The trouble that explains the others: not a cascade, and the earliest, with a head start for sudden ends."""
    return min(troubles, key=lambda one: (one.cascade, one.seen - HEAD_START * one.sudden))


def account(troubles: Sequence[Trouble]) -> str:
    """One line: the culprit, what it died of, when, and who followed."""
    cause = first_cause(troubles)
    when = datetime.fromtimestamp(cause.clock, UTC).strftime(", at %H:%M:%S UTC") if cause.clock else ""
    followers = sorted({one.node for one in troubles} - {cause.node})
    more = f" and {len(followers) - 4} more" if len(followers) > 4 else ""
    also = f" ({', '.join(followers[:4])}{more} ended because of it)" if followers else ""
    return f"{cause.node} {cause.what}{when}{also}"


def worker_trouble(node: str, report: Report, seen: float) -> Trouble:
    """What a node's report means for the search of the first cause."""
    code, who = report.exitcode, f"rank {report.rank}" if report.rank >= 0 else "torchrun"
    known = Signals(-code).name if -code in {*Signals} else f"signal {-code}"
    how = known if code < 0 else f"exit code {code}"
    if report.text:
        # An exception comes first, whatever the interpreter died of on its way out (gloo's threads: SIGABRT).
        what = f"- {who} failed with {report.text} ({how})"
    else:
        what = f"- {who} was ended by {how}" if code < 0 else f"- {who} ended with {how}"
        what += " (out of memory, or killed by hand)" * (code == -SIGKILL)
    hopeless = REFUSED if code == USAGE else UNFIT if BROKEN.match(report.text) else ""
    silent_end = not report.text and code in {-SIGTERM, -SIGKILL, 1, 128 + SIGTERM}
    return Trouble(
        node=node,
        what=what,
        seen=seen,
        clock=float(report.time),
        # SIGABRT is how NCCL's watchdog ends a healthy worker whose peer has gone.
        sudden=code < 0 and code != -SIGABRT and not report.text and not report.halted,
        cascade=is_consequence(report.text) or (report.halted and silent_end),
        hopeless=hopeless,
    )
