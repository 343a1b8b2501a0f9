"""Finds the known error in a text: a pasted line, or megabytes of logs of many ranks."""

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby

from app.known_errors.catalog import SEVERAL, KnownError, all_errors
from app.known_errors.logtext import line_at, plain

LONGEST_LINE = 400
WRAPPED_BYTES = 1 << 18
"""Of the end of a text, that is also searched for messages that something wrapped."""
GAP = 300
"""Characters that `...` may stand for where lines are joined."""
SOFT = re.compile(
    r"(?i)^\s*\[?W(?:[0-9]{4})?[ \]]|^\s*warning\b|^\s*WARN\[|\bwarning:|\bretrying\b|\bwill retry\b|\bwillRetry=1|"
    r"\bRetry\(|\bfall(?:s|ing)?[ -]?back\b|\bfallback\b|\bskipp(?:ed|ing)\b|\bignor(?:ed|ing)\b"
)
"""A line that tells of something survived."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """A known error, and the line that gave it away."""

    error: KnownError
    line: str
    number: int
    """Of the line, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    error: KnownError
    word: str
    """The longest word of it: where this is missing, the slow search can be left out."""
    pattern: re.Pattern[str]
    wrapped: re.Pattern[str] | None
    """For lines that are joined; None where a short text would be found by accident."""


def diagnose(log: str) -> Diagnosis | None:
    """The most specific known error in `log`, among equals the earliest; None when nothing in it is known.

    A consequence ("Connection closed by peer") is returned only when `log` holds no cause."""
    text = plain(log)
    found = _best(text)
    if found and found.error.rank >= SEVERAL:
        return found
    rest = _best_wrapped(text)
    return rest if rest and (not found or rest.error.rank > found.error.rank) else found


def _best(text: str) -> Diagnosis | None:
    for equals in _by_rank():
        found = [(start, each.error) for each in equals if (start := _first(each, text)) >= 0]
        if found:
            start, error = min(found, key=lambda pair: pair[0])
            number = text.count("\n", 0, start) + 1
            return Diagnosis(error=error, line=line_at(text, start)[:LONGEST_LINE], number=number)
    return None


def _first(each: _Text, text: str) -> int:
    """Where the text of the table begins; -1 for nowhere."""
    if each.word not in text:
        return -1
    for found in each.pattern.finditer(text):
        if each.error.warning or not SOFT.search(line_at(text, found.start())):
            return found.start()
    return -1


def _best_wrapped(text: str) -> Diagnosis | None:
    """As `_best`, where a terminal or a pager has broken messages into lines, within words too."""
    skipped = max(0, len(text) - WRAPPED_BYTES)
    lines = [("" if SOFT.search(line) else line.strip()) for line in text[skipped:].splitlines()]
    joined = "".join(lines)
    starts = [0, *accumulate(len(line) for line in lines)]
    for equals in _by_rank():
        found = [
            (match.start(), each.error)
            for each in equals
            if each.wrapped and each.word in joined and (match := each.wrapped.search(joined))
        ]
        if found:
            start, error = min(found, key=lambda pair: pair[0])
            number = bisect_right(starts, start)
            before = text.count("\n", 0, skipped)
            return Diagnosis(error=error, line=lines[number - 1][:LONGEST_LINE], number=before + number)
    return None


@cache
def _by_rank() -> tuple[tuple[_Text, ...], ...]:
    ordered = sorted(all_errors(), key=lambda error: -error.rank)
    return tuple(
        tuple(_text(error, alternative) for error in equals for alternative in error.match)
        for _, equals in groupby(ordered, key=lambda error: error.rank)
    )


def _text(error: KnownError, alternative: str) -> _Text:
    words = alternative.removeprefix("^").replace("...", " ").split()
    begin = r"(?:^|(?<=\v))" if alternative.startswith("^") else ""
    long = len(words) > 2 and not begin
    return _Text(
        error=error,
        word=max(words, key=len),
        pattern=re.compile(begin + r"[^\n]*?".join(_literals(alternative, r"\s+")), re.MULTILINE),
        wrapped=re.compile(f".{{0,{GAP}}}?".join(_literals(alternative, r"\s*"))) if long else None,
    )


def _literals(alternative: str, blank: str) -> Iterator[str]:
    for part in alternative.removeprefix("^").split("..."):
        yield blank.join(re.escape(word) for word in part.split())
