"""What a check found: one sentence, how bad it is, and the command that cures it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import groupby


class Level(StrEnum):
    """How bad a finding is; the order is that of badness."""

    SKIPPED = "skipped"
    """Not checked: the sentence says why. Never shown as green."""
    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


ORDER = tuple(Level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    check: str
    """One of CHECKS."""
    level: Level
    sentence: str
    cure: str = ""
    """A command or setting; "" where the sentence holds it, or where nothing is to be cured."""


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


def green(check: str, sentence: str) -> Finding:
    return Finding(check=check, level=Level.GREEN, sentence=sentence)


def red(check: str, sentence: str) -> Finding:
    """For a sentence that holds its cure."""
    return Finding(check=check, level=Level.RED, sentence=sentence)


def skipped(check: str, why: str) -> Finding:
    return Finding(check=check, level=Level.SKIPPED, sentence=why)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level; `skipped` if there is none."""
    return max((finding.level for finding in findings), key=ORDER.index, default=Level.SKIPPED)


def by_check(findings: Iterable[Finding]) -> dict[str, tuple[Finding, ...]]:
    """Findings by check in the order of CHECKS, the worst of each first."""
    known = sorted(findings, key=lambda each: (CHECKS.index(each.check), -ORDER.index(each.level)))
    return {check: tuple(group) for check, group in groupby(known, key=lambda each: each.check)}


def to_dict(row: Row) -> dict[str, object]:
    return {"rank": row.rank, "address": row.address, "findings": [asdict(each) for each in row.findings]}
