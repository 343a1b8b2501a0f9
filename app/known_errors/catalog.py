"""Known errors of a multi-node training: what a text means and what cures it.

The table is data, app/known_errors/catalog.toml, and is read only when something has failed.
`python -m app.known_errors.catalog docs/troubleshooting.md` writes it into the page, between the two marks.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path

TABLE = Path(__file__).with_name("catalog.toml")
BEGIN = "<!-- known errors: written by `python -m app.known_errors.catalog docs/troubleshooting.md` -->"
END = "<!-- end of the known errors -->"
LONGEST_LINE = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """One known error."""

    id: str
    """Short name, and the anchor in docs/troubleshooting.md."""
    group: str
    """Key of the table's `groups`."""
    rank: int
    """4 names the broken thing, 3 the cause, 2 several possible causes, 1 is a consequence, 0 a remark."""
    match: tuple[str, ...]
    """Texts, each an alternative; `...` stands for anything on the line, a blank for any white space, a leading `^` for
    the beginning of a line."""
    sample: str
    """One real text of the error."""
    cause: str
    cure: str
    source: str
    """Where the text comes from."""
    line: str = ""
    """The line that gave it away, when the symptom comes from `diagnose`."""


def diagnose(text: str) -> Symptom | None:
    """The most specific known error in `text`, among equals the earliest; None when nothing in it is known.

    `text` is the output of one rank or node, up to a few megabytes. A consequence ("Connection closed by peer") is
    returned only when `text` holds no cause.
    """
    by_rank = groupby(sorted(all_symptoms(), key=lambda symptom: -symptom.rank), key=lambda symptom: symptom.rank)
    for _, equals in by_rank:
        found = [(start, symptom) for symptom in equals if (start := _first(symptom, text)) is not None]
        if found:
            start, symptom = min(found, key=lambda pair: pair[0])
            return replace(symptom, line=_line_at(text, start))
    return None


@cache
def all_symptoms() -> tuple[Symptom, ...]:
    """The whole table, in the order of the file."""
    entries = tomllib.loads(TABLE.read_text(encoding="utf-8"))["symptom"]
    return tuple(Symptom(**{**entry, "match": tuple(entry["match"])}) for entry in entries)


def known_errors() -> str:
    """The table as Markdown: a heading per group, and one per symptom, whose anchor is the symptom's id."""
    groups: dict[str, str] = tomllib.loads(TABLE.read_text(encoding="utf-8"))["groups"]
    parts: list[str] = []
    for group, title in groups.items():
        members = [symptom for symptom in all_symptoms() if symptom.group == group]
        parts += [f"## {title}", " · ".join(f"[{symptom.id}](#{symptom.id})" for symptom in members)]
        parts += [_entry(symptom) for symptom in members]
    return "\n\n".join(parts)


def with_known_errors(page: str) -> str:
    """`page` with everything between the two marks written anew.

    Raises ValueError when a mark is missing.
    """
    head, _, rest = page.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise ValueError(f"the page needs a line {BEGIN!r} and below it a line {END!r}")
    return f"{head}{BEGIN}\n\n{known_errors()}\n\n{END}{tail}"


def main(arguments: list[str]) -> int:
    """Write the known errors into the page named first in `arguments`, or to standard output without one."""
    if not arguments:
        sys.stdout.write(known_errors() + "\n")
        return 0
    page = Path(arguments[0])
    page.write_text(with_known_errors(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def _first(symptom: Symptom, text: str) -> int | None:
    starts = [found.start() for pattern in _patterns(symptom) if (found := pattern.search(text))]
    return min(starts, default=None)


@cache
def _patterns(symptom: Symptom) -> tuple[re.Pattern[str], ...]:
    return tuple(_pattern(alternative) for alternative in symptom.match)


def _pattern(alternative: str) -> re.Pattern[str]:
    words = ".*?".join(_literals(alternative.removeprefix("^")))
    return re.compile(r"^(?:\[[^\]\n]*\]:?[ ]?)?" + words if alternative.startswith("^") else words, re.MULTILINE)


def _literals(alternative: str) -> Iterator[str]:
    for part in alternative.split("..."):
        yield r"\s+".join(re.escape(word) for word in part.split())


def _line_at(text: str, start: int) -> str:
    return text[text.rfind("\n", 0, start) + 1 :].partition("\n")[0].strip()[:LONGEST_LINE]


def _entry(symptom: Symptom) -> str:
    sample = symptom.sample.strip("\n")
    return (
        f"### {symptom.id}\n\n```text\n{sample}\n```\n\n{symptom.cause}\n\n"
        f"**Cure.** {symptom.cure}\n\n<sub>Text: {symptom.source}.</sub>"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
