"""What a plan is made of while it is being made: decisions with their reasons, problems, warnings."""

from dataclasses import dataclass, field

from app.config.envfile import Value
from app.config.errors import Problem, printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One thing that the launch will use."""

    name: str
    value: str
    source: str
    """`.env:3`, `environment`, `compose.yaml`, `command line`, `default`, `detected` or `derived`."""
    reason: str
    """In plain words, for a reader who knows PyTorch better than networks."""
    rejected: tuple[str, ...] = ()
    """Candidates that were not taken, each with why."""


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Collects what the parts of a plan decide; lives only inside `make_plan`."""

    decisions: list[Decision] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def decide(self, name: str, value: object, source: str, reason: str, rejected: tuple[str, ...] = ()) -> None:
        self.decisions.append(
            Decision(
                name=name, value=printable(str(value)), source=source, reason=printable(reason), rejected=rejected
            ),
        )

    def take(self, name: str, value: Value, reason: str) -> None:
        """Records a value that was given (or is the default) as it stands."""
        self.decide(name, value.shown, value.source, reason)

    def refuse(self, setting: str, message: str) -> None:
        self.problems.append(Problem(setting=setting, message=message))

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def shown(name: str, value: Value) -> str:
    """`NODE_RANK=3 (.env:2)`: how every message names a value."""
    return f"{name}={printable(value.shown)} ({value.source})"


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 process`, `2 processes`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
