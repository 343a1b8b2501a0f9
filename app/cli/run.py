"""`run`: this node's plan is made, told in five lines, and carried out."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.cli.explain import short
from app.config.errors import UserError, refusal
from app.config.settings import Settings, read_settings
from app.plan import Plan, make_plan, probe_for
from app.supervise.node import supervise
from app.supervise.restart_guard import read_final, write_final
from app.supervise.unfit import tell_node_0


def main(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path) -> int:
    """Takes part in the job until it ends; at once where Docker only repeats a start that has its verdict already.

    Raises UserError for what the user must change; Docker's next retry is then told so.
    """
    if again := read_final():
        # The whole of it stands above: this is the same container's log.
        raise UserError(f"not started again: {again.text.splitlines()[0]}", again.code)
    try:
        return start(arguments, environ, env_file)
    except UserError as error:
        write_final(error.code, error.message)
        raise


def start(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path) -> int:
    settings = read_settings(environ, env_file, arguments)
    try:
        return carry_out(settings)
    except UserError as error:
        tell_node_0(settings, error.message)
        raise


def carry_out(settings: Settings) -> int:
    plan = make_plan(settings, probe_for(settings))
    if not isinstance(plan, Plan):
        raise refusal(plan)
    print(short(plan), flush=True)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return supervise(plan)
