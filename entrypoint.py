"""The front door of a node: which command, hand over, exit code.

    python entrypoint.py [run] [SCRIPT | -m MODULE] [ARGS...]    train (what `docker compose up` does)
    python entrypoint.py explain [--json]                        what a start would use, and why
    python entrypoint.py doctor [--alone] [--json]               is this cluster fit to train? on all nodes at once
    python entrypoint.py bench [ARGS...]                         what the network gives; on all nodes at once
    python entrypoint.py report [--bundle FILE]                  what went wrong on this node, last time
    python entrypoint.py healthcheck                             waiting, running or stopping; for the engine

Settings come from the environment and from `.env` in the current folder; `.env.example` describes them.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from app.launch.errors import UserError

Command = Callable[[Sequence[str]], int]


def main(arguments: Sequence[str]) -> int:
    """Hands over to the command that the first argument names, `run` if it names none; returns the exit code."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    name = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    try:
        return COMMANDS[name or "run"](arguments[1:] if name else arguments)
    except UserError as error:
        print(f"torchrun-compose: {error.message}", file=sys.stderr, flush=True)
        return error.code


def run(arguments: Sequence[str]) -> int:
    """Takes part in the job until it ends; at once where Docker only repeats a start that has its verdict already."""
    from app.launch.final import read_final, write_final

    if again := read_final():
        raise UserError(f"not started again: {again.text}", again.code)
    try:
        return train(arguments)
    except UserError as error:
        write_final(error.code, error.message)
        raise


def train(arguments: Sequence[str]) -> int:
    """Makes this node's plan, prints it in five lines, and carries it out."""
    from app.launch.errors import refusal
    from app.launch.explain import short
    from app.launch.plan import Plan, make_plan, probe_for
    from app.launch.settings import read_settings
    from app.launch.supervise import supervise

    settings = read_settings(os.environ, env_file(), arguments)
    plan = make_plan(settings, probe_for(settings))
    if not isinstance(plan, Plan):
        raise refusal(plan)
    print(short(plan), flush=True)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return supervise(plan)


def explain(arguments: Sequence[str]) -> int:
    """Prints every decision of a start with its source and reason; starts nothing."""
    from app.launch.explain import explain as render
    from app.launch.plan import probe_for
    from app.launch.settings import read_settings

    as_json = "--json" in arguments
    settings = read_settings(os.environ, env_file(), [argument for argument in arguments if argument != "--json"])
    return render(settings, probe_for(settings), as_json=as_json)


def doctor(arguments: Sequence[str]) -> int:
    """Checks this node, and all nodes and pairs when they run it too; starts no training."""
    from app.doctor.command import main as examine

    return examine(arguments, os.environ, env_file())


def bench(arguments: Sequence[str]) -> int:
    """Measures collectives and pairs of nodes, in place of the training script."""
    return run(["-m", "app.bench", *arguments])


def report(arguments: Sequence[str]) -> int:
    """Prints the report of the last failure, or packs it with the logs into one archive without secrets."""
    from app.launch.bundle import main as tell

    return tell(arguments, os.environ, env_file())


def healthcheck(_arguments: Sequence[str]) -> int:
    """Tells the engine how this node is doing; 0 is healthy."""
    from app.launch.health import healthcheck as examine

    return examine()


def env_file() -> Path:
    return Path(os.environ.get("ENV_FILE") or ".env")


COMMANDS: dict[str, Command] = {
    "run": run,
    "explain": explain,
    "doctor": doctor,
    "bench": bench,
    "report": report,
    "healthcheck": healthcheck,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
