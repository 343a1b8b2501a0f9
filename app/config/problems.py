"""What is wrong, as data: a problem is made where it is found, and becomes a sentence where it is shown."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Literal

from app.config.errors import UserError, printable
from app.config.values import Value

CHECKS = ("rank", "names", "network", "ports", "rdma", "gpus", "limits", "script", "timeouts", "settings")
"""What a problem or decision may be about; doctor has a row for each."""
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
    """What is wrong, without the full stop; `{name}` is one of `values`, `{n:process|processes}` a number of them."""
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
        return _SENTENCE.vformat(self.what, (), self.values)

    @property
    def remedy(self) -> str:
        """`fix` with its values."""
        return _SENTENCE.vformat(self.fix, (), self.values)

    @property
    def message(self) -> str:
        """The whole sentence, with the lines below it."""
        sentences = " ".join(_ended(text) for text in (self.cause, self.remedy) if text)
        return "\n".join([sentences, *self.details])

    @property
    def texts(self) -> dict[str, str]:
        """The values as text."""
        return {name: _SENTENCE.format_field(value, "") for name, value in self.values.items()}

    def to_dict(self) -> dict[str, object]:
        """For JSON: names, values as text, and the sentence."""
        names = ("id", "severity", "check", "setting", "message")
        return {name: getattr(self, name) for name in names} | {"fix": self.remedy, "values": self.texts}


def problem(
    id: str,
    severity: Severity,
    *,
    what: str,
    fix: str = "",
    setting: str = "",
    details: tuple[str, ...] = (),
    **values: object,
) -> Problem:
    """A problem about the first of its `values` that is a variable, unless `setting` names another."""
    named = [value.name for value in values.values() if isinstance(value, Value)]
    about = setting or next(iter(named), "")
    return Problem(id=id, severity=severity, setting=about, values=values, what=what, fix=fix, details=details)


class _Sentence(Formatter):
    """Numbers with their noun, lists with commas, and nothing that could pass for a line of ours."""

    def format_field(self, value: object, format_spec: str) -> str:
        if isinstance(value, int) and format_spec:
            return count(value, *format_spec.split("|"))
        if isinstance(value, tuple | list):
            return printable(", ".join(map(str, value)))
        return printable(format(value, format_spec) if format_spec else str(value))


_SENTENCE = _Sentence()


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
