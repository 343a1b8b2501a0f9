"""What a check found, as data: id, check, severity, values, fix. The sentence is made of them when it is shown; those
of what is wrong are in findings.toml."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from pathlib import Path

from app.config.problems import filled, texts

TEXTS = Path(__file__).parent / "findings.toml"
Value = str | int | float


class Severity(StrEnum):
    """How bad a finding is; the order is that of badness."""

    SKIPPED = "skipped"
    """Not checked: the sentence says why. Never shown as green."""
    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


ORDER = tuple(Severity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    id: str
    """What was found, for programs: `nic-half-duplex`. It stays when the sentence is reworded."""
    check: str
    """One of CHECKS."""
    severity: Severity
    text: str
    """The sentence, with `{name}` for each of `values` that it tells; see `app.config.problems.Sentence`."""
    values: Mapping[str, Value] = field(default_factory=dict)
    fix: str = ""
    """A command or setting; "" where the sentence holds it, or where there is nothing to fix."""

    @property
    def sentence(self) -> str:
        return filled(self.text, self.values)

    @property
    def bad(self) -> bool:
        return self.severity in (Severity.YELLOW, Severity.RED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One node in the table."""

    rank: int
    """-1 for a node whose rank is unknown."""
    address: str
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        number = "?" if self.rank < 0 else str(self.rank)
        return f"node {number} ({self.address})" if self.address else f"node {number}"


CHECKS = (
    "rank",
    "settings",
    "network",
    "names",
    "ports",
    "rdma",
    "gpus",
    "limits",
    "disk",
    "clock",
    "engine",
    "present",
    "agree",
    "reach",
    "mtu",
    "speed",
    "shared",
    "all-reduce",
)
"""In the order of the table: first what a node knows by itself, from `present` on what only several nodes know."""


def green(check: str, text: str, **values: Value) -> Finding:
    return Finding(id=f"{check}-ok", check=check, severity=Severity.GREEN, text=text, values=values)


def skipped(check: str, text: str, **values: Value) -> Finding:
    return Finding(id=f"{check}-skipped", check=check, severity=Severity.SKIPPED, text=text, values=values)


def wrong(id: str, severity: Severity | None = None, **values: Value) -> Finding:
    """A finding of findings.toml; with a severity where it is not always as bad, and a `remedy` among its values where
    the fix is not always the same."""
    check = next(check for check, entries in texts(TEXTS).items() if id in entries)
    entry = texts(TEXTS)[check][id]
    level = severity or Severity(entry["severity"])
    fix = str(values.pop("remedy", "")) or filled(entry.get("fix", ""), values)
    return Finding(id=id, check=check, severity=level, text=entry["text"], values=values, fix=fix)


def from_sentence(
    id_: str, check: str, severity: Severity, sentence: str, fix: str = "", values: Mapping[str, Value] | None = None
) -> Finding:
    """A finding whose sentence somebody else made: the plan, or another node."""
    text = sentence.replace("{", "{{").replace("}", "}}")
    return Finding(id=id_, check=check, severity=severity, text=text, fix=fix, values=values or {})


def worst(findings: Iterable[Finding]) -> Severity:
    """The worst severity; `skipped` if there is none."""
    return max((finding.severity for finding in findings), key=ORDER.index, default=Severity.SKIPPED)


def by_check(findings: Iterable[Finding]) -> dict[str, tuple[Finding, ...]]:
    """Findings by check in the order of CHECKS, the worst of each first."""
    known = sorted(findings, key=lambda each: (CHECKS.index(each.check), -ORDER.index(each.severity)))
    return {check: tuple(group) for check, group in groupby(known, key=lambda each: each.check)}


def to_dict(finding: Finding) -> dict[str, object]:
    """For programs and for the other nodes."""
    return {
        "id": finding.id,
        "check": finding.check,
        "severity": finding.severity,
        "sentence": finding.sentence,
        "values": dict(finding.values),
        "fix": finding.fix,
    }
