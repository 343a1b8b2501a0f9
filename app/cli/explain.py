"""`explain`: the plan in words: each value, its source, its reason, and what was not chosen. Nothing here decides."""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

from app.config.envfile import SECRETS
from app.config.errors import printable
from app.config.options import Parser, script_line
from app.config.problems import Problem, count
from app.config.redaction import redact, redact_data, settings_secrets
from app.config.settings import BY_NAME, read_settings
from app.config.table import LEAST_WIDTH, PLAIN, wrapped
from app.plan import Draft, Plan, draft, probe_for
from app.plan.decisions import Decision
from app.plan.places import results

SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Node", ("rank", "names", "ports")),
    ("Network", ("network",)),
    ("InfiniBand and RoCE", ("rdma",)),
    ("Workers", ("gpus", "limits")),
    ("Script", ("script",)),
    ("Failures and stops", ("timeouts",)),
    ("Other variables", ("settings",)),
)
"""Title, and what its decisions are about."""

BOLD, DIM, RED, YELLOW, CYAN = "\033[1m", "\033[2m", "\033[31m", "\033[33m", "\033[36m"


def main(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path) -> int:
    """The command `explain [--json] [SCRIPT ...]`; starts nothing."""
    own, script = script_line(arguments)
    wanted = options(own)
    settings = read_settings(environ, env_file, script)
    found = draft(settings, probe_for(settings))
    return explain(found, as_json=wanted.json, secrets=settings_secrets(settings))


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="explain",
        usage="explain [-h] [--json] [SCRIPT | -m MODULE | --] [ARGS...]",
        description="What a start with this script and these arguments (without them: as set) would use, and why; "
        "starts nothing.",
        epilog="Exit code: 0, or 2 if settings are wrong.",
    )
    parser.add_argument("--json", action="store_true", help="the same for programs")
    return parser.read(arguments)


def explain(found: Draft, *, as_json: bool = False, out: TextIO | None = None, secrets: Sequence[str] = ()) -> int:
    """Prints what a launch would use, without secrets. Exit code 0, or 2 if settings are wrong."""
    found = _without(found, secrets)
    target = sys.stdout if out is None else out
    if as_json:
        text = to_json(found, secrets)
    elif target.isatty():
        import shutil

        text = to_table(found, shutil.get_terminal_size().columns, colour="NO_COLOR" not in os.environ)
    else:
        text = to_lines(found)
    try:
        print(text, file=target, flush=True)
    except BrokenPipeError:
        # `explain | head`: the reader has seen enough. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2 if found.problems else 0


def short(plan: Plan) -> str:
    """The plan in six lines, printed at each start."""
    workers, network = plan.workers, plan.network
    rdma = workers.backend == "nccl" and network.transport != "sockets"
    transport = f"RDMA through {','.join(network.rdma_ports)}" if rdma else "sockets only"
    devices = count(workers.gpus, "GPU") if workers.backend == "nccl" else "the CPU"
    warnings = f"{count(len(plan.warnings), 'warning')}; " if plan.warnings else ""
    node = f"node {plan.nodes.rank} of {plan.nodes.count}, {network.address} ({plan.nodes.rank_source})"
    return "\n".join(
        [
            f"run {plan.run_name}: {node}",
            f"network: {network.interface}, {transport}",
            f"workers: {workers.nproc} of {plan.world_size} on {devices}, {workers.backend}",
            f"script: {printable(shlex.join(plan.script.command))}",
            f"results: {printable(results(plan.script))}",
            f"store: {network.master_addr} port {network.master_port}; {warnings}run `explain` for details",
        ]
    )


def sections(found: Draft) -> list[tuple[str, list[Decision]]]:
    """The decisions by section, in the order of SECTIONS."""
    placed: dict[str, list[Decision]] = {title: [] for title, _ in SECTIONS}
    titles = {check: title for title, checks in SECTIONS for check in checks}
    for decision in found.decisions:
        placed[titles[decision.check]].append(decision)
    return [(title, decisions) for title, decisions in placed.items() if decisions]


def to_lines(found: Draft) -> str:
    """One line for each thing, for grep: `NAME=value (source): reason`, `NAME rejected: ...`, `warning: ...`."""
    lines: list[str] = []
    for _, decisions in sections(found):
        for each in decisions:
            lines.append(f"{each.name}={each.value} ({each.source}): {each.reason}")
            lines += [f"{each.name} rejected: {text}" for text in each.rejected]
    lines += [f"warning: {each.message}" for each in found.warnings]
    lines += [f"problem: {each.message}" for each in found.problems]
    return "\n".join(lines)


def to_table(found: Draft, width: int, *, colour: bool) -> str:
    """The same for people: a table with sections, wrapped to `width` columns."""

    def paint(style: str, text: str) -> str:
        return f"{style}{text}{PLAIN}" if colour else text

    names = max((len(each.name) for each in found.decisions), default=0)
    values = min(40, max((len(each.value) for each in found.decisions), default=0))
    sources = max((len(each.source) for each in found.decisions), default=0)
    indent = 2 + names + 2 + values + 2 + sources + 2
    if width - indent < LEAST_WIDTH:
        indent = 6
    lines: list[str] = []
    for title, decisions in sections(found):
        lines.append(paint(BOLD, title))
        for each in decisions:
            source = f"{each.source:<{sources}}"
            head = f"  {each.name:<{names}}  {each.value:<{values}}  {source}  "
            painted = f"  {each.name:<{names}}  {paint(CYAN, each.value.ljust(values))}  {source}  "
            reason = wrapped(each.reason, width, indent)
            if len(head) > indent:
                lines += [painted.rstrip(), *reason]
            else:
                lines += [painted + reason[0].strip(), *reason[1:]]
            for text in each.rejected:
                lines += [paint(DIM, line) for line in wrapped(f"not {text}", width, indent)]
        lines.append("")
    for style, word, problems in ((YELLOW, "warning", found.warnings), (RED, "problem", found.problems)):
        for problem in problems:
            first, *rest = problem.message.split("\n")
            start, *more = wrapped(f"{word}: {first}", width, 2)
            lines += [paint(style, start.strip()), *more, *rest]
    return "\n".join(lines).rstrip()


def _without(found: Draft, secrets: Sequence[str]) -> Draft:
    """The draft without secrets in what it tells; before lines are wrapped, which would tear them."""

    def clean(text: str) -> str:
        return redact(text, secrets)

    def sentence(text: str) -> str:
        return clean(text).replace("{", "{{").replace("}", "}}")

    def cleaned(problem: Problem) -> Problem:
        return replace(
            problem,
            what=sentence(problem.cause),
            fix=sentence(problem.remedy),
            values={name: clean(text) for name, text in problem.texts.items()},
            details=tuple(map(clean, problem.details)),
        )

    decisions = [
        replace(
            each,
            value=clean(each.value),
            reason=clean(each.reason),
            rejected=tuple(clean(text) for text in each.rejected),
        )
        for each in found.decisions
    ]
    return replace(
        found,
        decisions=tuple(decisions),
        warnings=tuple(map(cleaned, found.warnings)),
        problems=tuple(map(cleaned, found.problems)),
    )


def to_json(found: Draft, secrets: Sequence[str] = ()) -> str:
    """The same for machines: `plan` (null if something is wrong), `decisions`, `warnings`, `problems`."""
    import json

    plan = None
    if found.plan is not None:
        plan = asdict(replace(found.plan, decisions=(), warnings=()))
        del plan["decisions"], plan["warnings"]
        plan["script"]["env"] = _public(found.plan)
        plan["monitoring"]["notify"] = len(found.plan.monitoring.notify)
        plan |= {"equal": dict(found.plan.equal), "world_size": found.plan.world_size}
    content = {
        "plan": plan,
        "decisions": [asdict(each) for each in found.decisions],
        "warnings": [each.to_dict() for each in found.warnings],
        "problems": [each.to_dict() for each in found.problems],
    }
    return json.dumps(redact_data(content, secrets), indent=2, default=str)


def _public(plan: Plan) -> dict[str, str]:
    # Lines of secrets/env are handed on too, and without Docker those of .env that we know nothing about.
    hidden = {each.name for each in plan.decisions if each.source.startswith(str(SECRETS))}
    ours = {*BY_NAME, "PYTHONPATH", *(each.name for each in plan.decisions)} - hidden
    return {name: value if name in ours else "(not shown)" for name, value in plan.script.env.items()}
