"""What is wrong, as data: a problem is made where it is found, and becomes a sentence where it is shown.

The sentences are in problems.toml, by id."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Literal

from app.config.errors import UserError, printable
from app.config.values import Value

CHECKS = ("rank", "names", "network", "ports", "rdma", "gpus", "limits", "script", "timeouts", "settings")
"""What a problem or decision may be about; doctor has a row for each."""
TEXTS = Path(__file__).parent / "problems.toml"
Severity = Literal["error", "severe", "warning"]
"""`error`: nothing can start. `severe`: the job starts, and will fail or lose its network. `warning`: it costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that the user must or should change."""

    id: str
    """`network.link-down`: what it is about (one of CHECKS), and its name."""
    severity: Severity
    setting: str = ""
    """The variable that it is about, `NODES` for instance; "" where it is about the machine."""
    values: Mapping[str, object] = field(default_factory=dict)
    what: str
    """What is wrong, without the full stop, with `{name}` for each of `values` that it tells; see `Sentence`."""
    fix: str = ""
    """What to do, in the same form."""
    details: tuple[str, ...] = ()
    """Lines to show below the sentence."""

    @property
    def check(self) -> str:
        return self.id.partition(".")[0]

    @property
    def cause(self) -> str:
        """`what` with its values."""
        return filled(self.what, self.values)

    @property
    def remedy(self) -> str:
        """`fix` with its values."""
        return filled(self.fix, self.values)

    @property
    def message(self) -> str:
        """The whole sentence, with the lines below it."""
        sentences = " ".join(_ended(text) for text in (self.cause, self.remedy) if text)
        return "\n".join([sentences, *self.details])

    @property
    def texts(self) -> dict[str, str]:
        """The values as text."""
        return {name: filled("{value}", {"value": value}) for name, value in self.values.items()}

    def to_dict(self) -> dict[str, object]:
        """For JSON: names, values as text, and the sentence."""
        names = ("id", "severity", "check", "setting", "message")
        return {name: getattr(self, name) for name in names} | {"fix": self.remedy, "values": self.texts}


def problem(
    id: str,
    severity: Severity = "error",
    *,
    what: str = "",
    fix: str = "",
    setting: str = "",
    details: tuple[str, ...] = (),
    **values: object,
) -> Problem:
    """A problem about the first of its `values` that is a variable, unless `setting` names another. Its sentence is in
    problems.toml, unless a room with a table of its own says `what` is wrong."""
    about = setting or next((value.name for value in values.values() if isinstance(value, Value)), "")
    text = {"what": what, "fix": fix} if what else text_of(id)
    return Problem(id=id, severity=severity, setting=about, values=values, details=details, **text)


def text_of(id: str) -> Mapping[str, str]:
    """`what` and `fix` of a problem. What is wrong with any value, whatever the setting, stands under `value`."""
    check, _, name = id.partition(".")
    return texts(TEXTS)[check].get(name) or texts(TEXTS)["value"][name]


@cache
def texts(file: Path) -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """Sentences by the parts of their id."""
    return tomllib.loads(file.read_text(encoding="utf-8"))


class Sentence(Formatter):
    """Numbers with their noun (`{n:process|processes}`), one of two wordings (`{flag:if so|if not}`), lists with
    commas, and nothing that could pass for a line of ours."""

    def format_field(self, value: object, format_spec: str) -> str:
        if isinstance(value, bool) and format_spec:
            return format_spec.partition("|")[0 if value else 2]
        if isinstance(value, int) and format_spec:
            return count(value, *format_spec.split("|"))
        if isinstance(value, tuple | list):
            return printable(", ".join(map(str, value)))
        return printable(format(value, format_spec) if format_spec else str(value))


def filled(text: str, values: Mapping[str, object]) -> str:
    return Sentence().vformat(text, (), values)


def _ended(text: str) -> str:
    return text if text.endswith(("?", ".")) else f"{text}."


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 process`, `2 processes`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def refusal(problems: Iterable[Problem]) -> UserError:
    """All `problems` as one error, in the order in which they were found, each once."""
    sentences = list(dict.fromkeys(each.message for each in problems))
    if len(sentences) == 1:
        return UserError(sentences[0])
    return UserError("\n".join([f"{len(sentences)} settings are wrong:", *(f"  - {text}" for text in sentences)]))
