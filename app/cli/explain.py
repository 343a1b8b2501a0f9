"""`explain`: the plan in words: each value, its source, its reason, and what was not chosen. Nothing here decides."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from app.config.settings import BY_NAME, read_settings
from app.plan import Draft, Plan, draft, probe_for
from app.plan.decisions import Decision, count

SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Node", ("NODES", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CONTROL_PORT")),
    ("Network", ("interface", "address", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY")),
    ("InfiniBand and RoCE", ("RDMA ports", "NCCL_IB_", "RoCE GID", "GPU to port", "GPUDirect RDMA", "GLOO_IB_")),
    ("Workers", ("GPUs", "HARDWARE", "BACKEND", "NPROC_PER_NODE", "world size", "OMP_NUM_THREADS", "limits")),
    ("Script", ("TRAIN_", "DATA", "RUN", "CHECKPOINT", "MIRROR_", "CLUSTER_TOKEN_FILE", "torchrun")),
    ("Failures and stops", ("START_", "REJOIN_", "HEARTBEAT_", "STOP", "MAX_RESTARTS", "MIN_NODES", "HANG_")),
    ("Other variables", ("",)),
)
"""Title and beginnings of names; a decision stands in the first section that fits."""

USAGE = """explain [--json] [SCRIPT | -m MODULE] [ARGS...]

What a start with this script and these arguments (without them: as set) would use, and why; starts nothing.
--json prints the same for programs. Exit code: 0, or 2 if settings are wrong."""

BOLD, DIM, RED, YELLOW, CYAN, PLAIN = "\033[1m", "\033[2m", "\033[31m", "\033[33m", "\033[36m", "\033[0m"


def main(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path) -> int:
    """The command `explain [--json] [SCRIPT ...]`; starts nothing."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    settings = read_settings(environ, env_file, [argument for argument in arguments if argument != "--json"])
    return explain(draft(settings, probe_for(settings)), as_json="--json" in arguments)


def explain(found: Draft, *, as_json: bool = False, out: TextIO | None = None) -> int:
    """Prints what a launch would use. Exit code 0, or 2 if settings are wrong."""
    target = sys.stdout if out is None else out
    if as_json:
        text = to_json(found)
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
    """The plan in five lines, printed at each start."""
    found = {each.name: each for each in plan.decisions}
    rank, gpus = found["NODE_RANK"], found["GPUs"]
    rdma = plan.workers.backend == "nccl" and plan.network.transport != "sockets"
    transport = f"RDMA through {found['RDMA ports'].value}" if rdma else "sockets only"
    devices = count(int(gpus.value), "GPU") if plan.workers.backend == "nccl" else "the CPU"
    args = f" {found['TRAIN_ARGS'].value}" if "TRAIN_ARGS" in found else ""
    warnings = f"{count(len(plan.warnings), 'warning')}; " if plan.warnings else ""
    return "\n".join(
        [
            f"run {plan.run_name}: node {plan.nodes.rank} of {plan.nodes.count}, "
            f"{plan.network.address} ({rank.source})",
            f"network: {plan.network.interface}, {transport}",
            f"workers: {plan.workers.nproc} of {plan.world_size} on {devices}, {plan.workers.backend}",
            f"script: {found['TRAIN_SCRIPT'].value}{args}, in {found['RUN_DIR'].value}",
            f"store: {plan.network.master_addr} port {plan.network.master_port}; {warnings}`explain` tells the reasons",
        ]
    )


def sections(found: Draft) -> list[tuple[str, list[Decision]]]:
    """The decisions by section, in the order of SECTIONS."""
    placed: dict[str, list[Decision]] = {title: [] for title, _ in SECTIONS}
    for decision in found.decisions:
        title = next(title for title, starts in SECTIONS if decision.name.startswith(starts))
        placed[title].append(decision)
    return [(title, decisions) for title, decisions in placed.items() if decisions]


def to_lines(found: Draft) -> str:
    """One line for each thing, for grep: `NAME=value (source): reason`, `NAME rejected: ...`, `warning: ...`."""
    lines: list[str] = []
    for _, decisions in sections(found):
        for each in decisions:
            lines.append(f"{each.name}={each.value} ({each.source}): {each.reason}")
            lines += [f"{each.name} rejected: {text}" for text in each.rejected]
    lines += [f"warning: {text}" for text in found.warnings]
    lines += [f"problem: {problem.message}" for problem in found.problems]
    return "\n".join(lines)


def to_table(found: Draft, width: int, *, colour: bool) -> str:
    """The same for people: a table with sections, wrapped to `width` columns."""

    def paint(style: str, text: str) -> str:
        return f"{style}{text}{PLAIN}" if colour else text

    names = max((len(each.name) for each in found.decisions), default=0)
    values = min(40, max((len(each.value) for each in found.decisions), default=0))
    sources = max((len(each.source) for each in found.decisions), default=0)
    indent = 2 + names + 2 + values + 2 + sources + 2
    if width - indent < 30:
        indent = 6
    lines: list[str] = []
    for title, decisions in sections(found):
        lines.append(paint(BOLD, title))
        for each in decisions:
            source = f"{each.source:<{sources}}"
            head = f"  {each.name:<{names}}  {each.value:<{values}}  {source}  "
            painted = f"  {each.name:<{names}}  {paint(CYAN, each.value.ljust(values))}  {source}  "
            reason = _wrapped(each.reason, width, indent)
            if len(head) > indent:
                lines += [painted.rstrip(), *reason]
            else:
                lines += [painted + reason[0].strip(), *reason[1:]]
            for text in each.rejected:
                lines += [paint(DIM, line) for line in _wrapped(f"not {text}", width, indent)]
        lines.append("")
    for style, word, texts in (
        (YELLOW, "warning", list(found.warnings)),
        (RED, "problem", [problem.message for problem in found.problems]),
    ):
        for text in texts:
            first, *rest = text.split("\n")
            wrapped = _wrapped(f"{word}: {first}", width, 2)
            lines += [paint(style, wrapped[0].strip()), *wrapped[1:], *rest]
    return "\n".join(lines).rstrip()


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    import textwrap

    room = max(30, width - indent)
    return textwrap.wrap(text, room + indent, initial_indent=" " * indent, subsequent_indent=" " * indent) or [""]


def to_json(found: Draft) -> str:
    """The same for machines: `plan` (null if something is wrong), `decisions`, `warnings`, `problems`."""
    import json

    plan = None
    if found.plan is not None:
        plan = {name: value for name, value in asdict(found.plan).items() if name not in ("decisions", "warnings")}
        plan["script"]["env"] = _public(found.plan)
        plan |= {"equal": dict(found.plan.equal), "world_size": found.plan.world_size}
    content = {
        "plan": plan,
        "decisions": [asdict(each) for each in found.decisions],
        "warnings": found.warnings,
        "problems": [asdict(each) for each in found.problems],
    }
    return json.dumps(content, indent=2, default=str)


def _public(plan: Plan) -> dict[str, str]:
    # Without Docker, lines of .env that we know nothing about are handed on too, and may be secrets.
    ours = {*BY_NAME, "PYTHONPATH", *(each.name for each in plan.decisions)}
    return {name: value if name in ours else "(as in .env)" for name, value in plan.script.env.items()}
