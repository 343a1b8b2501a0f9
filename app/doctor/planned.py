"""What the plan itself says is wrong with this node, each problem at its check."""

from app.config.problems import Problem
from app.doctor.findings import Finding, Severity, from_sentence
from app.plan import Draft

ELSEWHERE = {"script": "settings", "timeouts": "settings"}
"""What a problem is about, where doctor has no check of that name."""
SEVERITIES = {"error": Severity.RED, "severe": Severity.RED, "warning": Severity.YELLOW}


def planned(draft: Draft) -> tuple[Finding, ...]:
    """What keeps the plan from being made, and its warnings."""
    return tuple(_finding(problem) for problem in (*draft.problems, *draft.warnings))


def _finding(problem: Problem) -> Finding:
    check = ELSEWHERE.get(problem.check, problem.check)
    sentence = "\n".join([f"{problem.cause}.", *problem.details])
    return from_sentence(problem.id, check, SEVERITIES[problem.severity], sentence, problem.remedy, problem.texts)
