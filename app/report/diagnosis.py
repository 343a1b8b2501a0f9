"""Which known error a node died of. Its own first error decides; what else stands in its logs can only add to it."""

import signal
from collections.abc import Mapping
from dataclasses import replace

from app.known_errors.catalog import BROKEN, CAUSE, CONSEQUENCE, all_errors
from app.known_errors.consequences import is_consequence
from app.known_errors.diagnose import Diagnosis, diagnose
from app.report.history import RoundRecord, end_of_log, last_error, may_speak

BY_EXCEPTION = " failed with "
"""In a verdict whose first cause is an exception (gang/verdict.py)."""


def diagnosis(
    last: RoundRecord | None, logs: Mapping[str, str], verdict: str, *, memory_kills: bool
) -> Diagnosis | None:
    """`last` is this node's last round, `logs` its workers' by `local rank 0 stderr`; `memory_kills`: the control group
    has killed for memory since the start.

    Remarks and consequences in the logs never stand beside an exception of this node: healthy ranks print them too.
    """
    own = None
    if last is not None and last.failed:
        own = _own(last, _last_words(_of_first(last, logs)), memory_kills)
        if own and own.error.rank >= CAUSE:
            return own
    found = [own, diagnose(verdict), _broken(_wider(last, own, logs, verdict))]
    named = [each for each in found if each and each.error.rank >= CONSEQUENCE]
    return max(named, key=lambda each: each.error.rank, default=None)


def in_own_words(last: RoundRecord, logs: Mapping[str, str]) -> RoundRecord:
    """With the last error in the log of the rank that failed first, if that left no exception and may have spoken.
    A rank may have been told to end before its failure was noticed, by peers that failed because of it."""
    if last.message or not last.failures or not may_speak(last.failures[0].exitcode):
        return last
    words = last_error(_last_words(_of_first(last, logs)))
    return last if is_consequence(words) else replace(last, message=words)


def _own(last: RoundRecord, words: str, memory_kills: bool) -> Diagnosis | None:
    """What this node's own first failure is known as."""
    if last.message:
        return diagnose(f"{last.traceback}\n{last.message}")
    code = last.failures[0].exitcode if last.failures else last.code
    if code == -signal.SIGKILL and memory_kills:
        by_kernel = next(each for each in all_errors() if each.id == "oom-kernel")
        line = f"{last.first_error}, and the control group has killed for memory"
        return Diagnosis(error=by_kernel, line=line, number=1)
    said = diagnose(words) if code == 0 or may_speak(code) else None
    return said if said and said.error.rank >= CONSEQUENCE else diagnose(last.first_error)


def _wider(last: RoundRecord | None, own: Diagnosis | None, logs: Mapping[str, str], verdict: str) -> Mapping[str, str]:
    """The logs in which a broken thing may explain this end."""
    if last is not None and last.message and (own is None or own.error.rank > CONSEQUENCE):
        return _of_first(last, logs)
    # A cause that is known as another rank's exception is not found in the logs of those who followed.
    return {} if BY_EXCEPTION in verdict else logs


def _of_first(last: RoundRecord, logs: Mapping[str, str]) -> Mapping[str, str]:
    """The logs of the rank that failed first; all, if it is not known which."""
    rank = last.failures[0].local_rank if last.failures else -1
    own = {name: text for name, text in logs.items() if name.startswith(f"local rank {rank} ")}
    return own or logs


def _last_words(logs: Mapping[str, str]) -> str:
    return "\n".join(map(end_of_log, logs.values()))


def _broken(logs: Mapping[str, str]) -> Diagnosis | None:
    found = diagnose(_last_words(logs))
    return found if found and found.error.rank >= BROKEN else None
