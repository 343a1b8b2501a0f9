"""What a plan is made of while it is being made: decisions with their reasons, problems, warnings."""

from dataclasses import dataclass, field
from typing import Any

from app.config.errors import printable
from app.config.problems import Problem, Severity, problem
from app.config.values import Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One thing that the launch will use; for display, since the plan has it as a field."""

    name: str
    check: str
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
    warnings: list[Problem] = field(default_factory=list)

    def decide(
        self, check: str, name: str, value: object, source: str, reason: str, rejected: tuple[str, ...] = ()
    ) -> None:
        self.decisions.append(
            Decision(
                check=check,
                name=name,
                value=printable(str(value)),
                source=source,
                reason=printable(reason),
                rejected=rejected,
            )
        )

    def take(self, check: str, value: Value[Any], reason: str) -> None:
        """Records a value that was given (or is the default) as it stands."""
        self.decide(check, value.name, value.shown, value.source, reason)

    def refuse(self, id: str, *, setting: str = "", details: tuple[str, ...] = (), **values: object) -> None:
        """Something that keeps the plan from being made: a problem of app/config/problems.toml."""
        named: dict[str, Any] = values
        self.problems.append(problem(id, "error", setting=setting, details=details, **named))

    def warn(
        self,
        id: str,
        severity: Severity = "warning",
        *,
        setting: str = "",
        details: tuple[str, ...] = (),
        **values: object,
    ) -> None:
        """Something that the job starts with, at a cost."""
        named: dict[str, Any] = values
        self.warnings.append(problem(id, severity, setting=setting, details=details, **named))
