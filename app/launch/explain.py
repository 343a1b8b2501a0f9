"""`explain`: the plan in words: each value, its source, its reason, and what was not chosen. Nothing here decides."""

import json
import sys
from typing import TextIO

from app.launch.host import Host
from app.launch.plan import Draft, Plan, draft
from app.launch.settings import Settings


def explain(settings: Settings, host: Host, *, as_json: bool = False, out: TextIO = sys.stdout) -> int:
    """Prints what a launch with these settings would use. Exit code 0, or 2 if settings are wrong."""
    found = draft(settings, host)
    if as_json:
        print(to_json(found), file=out)
    else:
        print(to_text(found), file=out)
    return 2 if found.problems else 0


def short(plan: Plan) -> str:
    """The plan in five lines, printed at each start."""
    return "\n".join([f"run {plan.run_name}: node {plan.node_rank} of {len(plan.nodes)}"])


def to_text(found: Draft) -> str:
    lines = [f"{each.name}={each.value} ({each.source}): {each.reason}" for each in found.decisions]
    lines += [f"warning: {text}" for text in found.warnings]
    lines += [f"problem: {problem.message}" for problem in found.problems]
    return "\n".join(lines)


def to_json(found: Draft) -> str:
    return json.dumps({"problems": [problem.message for problem in found.problems]}, indent=2)
