"""`run`: this node's plan is made, told in five lines, and carried out."""

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.config.console import show
from app.config.errors import UserError
from app.config.options import Parser, script_line
from app.config.problems import refusal
from app.config.settings import Settings, read_settings
from app.plan import Plan, make_plan, probe_for
from app.supervise.preloading import preloaded
from app.supervise.restart_guard import read_final, write_final


def main(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path) -> int:
    """Takes part in the job until it ends; at once where Docker only repeats a start that has its verdict already.

    Raises UserError for what the user must change; Docker's next retry is then told so.
    """
    own, script = script_line(arguments)
    options(own)
    if again := read_final():
        # The whole of it stands above: this is the same container's log.
        raise UserError(f"not started again: {again.text.splitlines()[0]}", again.code)
    try:
        return start(script, environ, env_file)
    except UserError as error:
        write_final(error.code, error.message)
        raise


def options(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="run",
        usage="run [-h] [SCRIPT | -m MODULE | --] [ARGS...]",
        description="Takes part in the job until it ends: this node's share of the script's processes. Without a "
        "script, that of TRAIN_SCRIPT; options for it stand after --.",
        epilog="Exit codes: docs/exit-codes.md.",
    )
    parser.read(arguments)


def start(script: Sequence[str], environ: Mapping[str, str], env_file: Path) -> int:
    settings = read_settings(environ, env_file, script)
    try:
        return carry_out(settings)
    except UserError as error:
        from app.supervise.unfit import tell_node_0

        told = clean(settings, error.message)
        tell_node_0(settings, told)
        raise UserError(told, error.code) from None


def carry_out(settings: Settings) -> int:
    plan = make_plan(settings, probe_for(settings))
    if not isinstance(plan, Plan):
        raise refusal(plan)
    with preloaded(plan, functools.partial(clean, settings)) as process:
        # More than half of the launcher's own processor time goes into these, and torch is being loaded meanwhile.
        from app.cli.explain import short
        from app.config.redaction import redact, settings_secrets
        from app.supervise.node import supervise

        secrets = settings_secrets(settings)
        show(f"{redact(short(plan), secrets)}\n", sys.stdout)
        for warning in plan.warnings:
            show(f"warning: {redact(warning.message, secrets)}\n", sys.stderr)
        return supervise(plan, process, secrets)


def clean(settings: Settings, text: str) -> str:
    """Without secrets."""
    from app.config.redaction import redact, settings_secrets

    return redact(text, settings_secrets(settings))
