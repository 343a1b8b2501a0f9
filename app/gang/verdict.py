"""What ended a round, and which of many failures was the first cause."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import IntEnum
from signal import SIGABRT, SIGKILL, SIGTERM, Signals

from app.config.exitcodes import ExitCode
from app.engine.outcome import Explanation
from app.gang.messages import WorkerReport
from app.known_errors.consequences import is_consequence

BROKEN = re.compile(r"(ModuleNotFoundError|ImportError|SyntaxError|IndentationError|TabError): ")
REFUSED = "It ended as scripts do that refuse their arguments: see its own message, and correct TRAIN_ARGS"
UNFIT = "The script cannot start like this: correct it, TRAIN_SCRIPT or the image"
USAGE = 2
"""The exit code of argparse, and of app.train, for wrong settings."""
HEAD_START = 3.0
"""Seconds by which a lost node or a signal may come after the errors it caused: they are found by polling."""
THE_JOB = "the job"
"""In place of a node that failed: all hang."""
TOGETHER = 1.0
"""Seconds within which the order of two failures tells nothing: torchrun looks ten times a second, a network is not
the same for all, and a busy machine is late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How the job ended, the same on all nodes."""

    code: ExitCode
    text: str
    cause: str = ""
    fix: str = ""
    """Of the known error that the first cause is, for all nodes: its logs are on one."""


class JobEnded(Exception):  # noqa: N818 - an end, not always an error
    """The job ends here."""

    def __init__(self, code: ExitCode, text: str, cause: str = "", fix: str = "") -> None:
        super().__init__(text)
        self.verdict = Verdict(code=code, text=text, cause=cause, fix=fix)


class Weight(IntEnum):
    """How much a failure says of the first cause. Words beat silence, whatever came first."""

    CAUSE = 0
    """An error in its own words, a signal, or a lost node: nobody else's end explains it."""
    EXIT_CODE = 1
    """No word, but an exit code of its own."""
    ABORT = 2
    """SIGABRT without a word: native code gave up, its own or that of NCCL's watchdog, which has words mostly."""
    SILENT = 3
    """Exit code 1 without a word: the script said it elsewhere, or its peer has gone."""
    CONSEQUENCE = 4
    """Words that only say that a peer has gone."""
    FOLLOWED = 5
    """It was told to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFailure:
    """One node's part in the end of a round."""

    node: str
    """As shown: "node 1 (192.168.5.229)"."""
    what: str
    seen: float
    """Monotonic seconds of node 0, when the first sign of it came in."""
    clock: float = 0.0
    """Seconds since the epoch on the failing node; 0 where it could not tell."""
    code: ExitCode = ExitCode.TRAINING
    weight: Weight = Weight.CAUSE
    abrupt: bool = False
    """A lost node or a signal, which may be noticed later than what it caused."""
    silent: bool = False
    """Lost because it was not heard any more, on an open connection."""
    how: str = ""
    """Its words, or how it ended without any: other ranks that failed alike are no rivals."""
    found: Explanation = field(default_factory=Explanation)
    not_retryable: str = ""
    """What the user must change, where another try would end the same way."""

    @property
    def kind(self) -> str:
        """Why the job starts again: lost, network, hang or worker."""
        kinds = {ExitCode.LOST: "lost", ExitCode.UNREACHABLE: "network"}
        return kinds.get(self.code, "hang" if self.node == THE_JOB else "worker")

    @property
    def signature(self) -> tuple[str, str]:
        """Type and place of an error in its own words: twice the same without progress is not worth a third try."""
        words, place = self.found.words, self.found.place
        kind = words.partition(":")[0] if place else words
        return (kind, place) if words and self.weight == Weight.CAUSE else ("", "")

    @property
    def noticed(self) -> float:
        return self.seen - HEAD_START if self.abrupt else self.seen


def first_causes(failures: Sequence[NodeFailure]) -> list[NodeFailure]:
    """The failures that explain the others, the first one first; several where they came together, or where nothing
    decides between them."""
    weight = min(each.weight for each in failures)
    rivals = sorted((each for each in failures if each.weight == weight), key=lambda each: each.noticed)
    first = rivals[0]
    if weight == Weight.CAUSE and not first.abrupt:
        return [first]
    together = [each for each in rivals if each.abrupt == first.abrupt and each.seen - first.seen < TOGETHER]
    if weight == Weight.SILENT:
        # An abort takes a while to be seen, and its node is told to end meanwhile by those whose peer has gone.
        together = [each for each in together if each.how == SIGABRT.name] or together
    return [first] if weight == Weight.EXIT_CODE and {each.how for each in together} == {first.how} else together


def is_unclear(causes: Sequence[NodeFailure]) -> bool:
    """Whether `causes` are mere candidates."""
    return causes[0].weight == Weight.CONSEQUENCE or (causes[0].weight > Weight.CAUSE and len(causes) > 1)


def summarize(failures: Sequence[NodeFailure]) -> str:
    """One line: the culprit, what it died of, when, and who followed."""
    causes = first_causes(failures)
    named = {each.node for each in causes}
    alike = sorted({each.node for each in failures if each.how and each.how == causes[0].how} - named)
    followers = sorted({each.node for each in failures} - named - {*alike})
    also = [f"{_few(alike)} failed alike"] if alike else []
    also += [f"{_few(followers)} stopped as a result"] if followers and not is_unclear(causes) else []
    told = "; ".join(f"{each.node} {each.what}{_when(each)}" for each in causes)
    return ("cause unclear: " if is_unclear(causes) else "") + told + (f" ({'; '.join(also)})" if also else "")


def worker_failure(node: str, report: WorkerReport, seen: float) -> NodeFailure:
    """What a node's report means for the search of the first cause."""
    code, who = report.exitcode, f"rank {report.rank}" if report.rank >= 0 else "torchrun"
    if report.alike:
        who += f" and {report.alike} other rank{'s' if report.alike > 1 else ''} of the node"
    if code < 0:
        name = Signals(-code).name if -code in {*Signals} else f"signal {-code}"
        hint = f" ({report.found.note or 'out of memory, or killed by hand'})" if code == -SIGKILL else ""
        how, silent = name, f"{'were' if report.alike else 'was'} ended by {name}{hint}"
    else:
        how, silent = f"exit code {code}", f"ended with exit code {code}"
    # An exception comes first, whatever the interpreter died of on its way out (gloo's threads: SIGABRT).
    what = f"failed with {report.found.words} ({how})" if report.found.words else silent
    return NodeFailure(
        node=node,
        what=f"- {who} {what}",
        seen=seen,
        clock=report.time,
        weight=_weight(report),
        # SIGABRT is how NCCL's watchdog ends a healthy worker whose peer has gone.
        abrupt=code < 0 and code != -SIGABRT and not report.found.words and not report.halted,
        how=report.found.words or how,
        found=report.found,
        not_retryable=REFUSED if code == USAGE else UNFIT if BROKEN.match(report.found.words) else "",
    )


def left_alone(failures: Sequence[NodeFailure], finished: Mapping[str, str]) -> Sequence[NodeFailure]:
    """Where nothing but the end of a peer is known to have failed, and a node had `finished` by itself meanwhile (its
    name, and after which collective), the others still waited for it."""
    if not finished or not failures or min(each.weight for each in failures) != Weight.CONSEQUENCE:
        return failures
    names = " and ".join(f"{node} had finished after {after}" for node, after in [*finished.items()][:4])
    fix = "give all ranks the same number (drop_last, or torch.distributed.algorithms.Join)"
    told = f"{names} while it waited in a collective: unequal numbers of batches or steps. Fix: {fix}"
    first = first_causes(failures)[0]
    rest = [each for each in failures if each is not first]
    return [replace(first, what=f"{first.what}: {told}", weight=Weight.CAUSE), *rest]


def suspect_self(failures: Sequence[NodeFailure], own: str, others: int, link: str) -> Sequence[NodeFailure]:
    """Who hears nobody any more suspects itself: node 0 (`own`) when all `others` fell silent at once, or when its own
    link is known to be down (`link` says so)."""
    silent = [each for each in failures if each.silent]
    if not silent or (len(silent) < others and not link):
        return failures
    names = "any other node" if others > 1 else silent[0].node
    told = link or ("its own link is cut" if others > 1 else "the link of one of the two is cut")
    cut = NodeFailure(
        node=own,
        what=f"no longer hears {names}: {told}",
        seen=min(each.seen for each in silent),
        clock=silent[0].clock,
        code=ExitCode.LOST,
        abrupt=True,
    )
    return [cut, *(each for each in failures if not each.silent)]


def _weight(report: WorkerReport) -> Weight:
    if report.found.words:
        return Weight.CONSEQUENCE if is_consequence(report.found.words) else Weight.CAUSE
    if report.halted and report.exitcode in {-SIGTERM, -SIGKILL, 1, 128 + SIGTERM}:
        return Weight.FOLLOWED
    if report.exitcode == -SIGABRT:
        return Weight.SILENT if report.halted else Weight.ABORT
    if report.exitcode < 0:
        return Weight.CAUSE
    return Weight.SILENT if report.exitcode == 1 else Weight.EXIT_CODE


def _when(failure: NodeFailure) -> str:
    return datetime.fromtimestamp(failure.clock, UTC).strftime(", at %H:%M:%S UTC") if failure.clock else ""


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
