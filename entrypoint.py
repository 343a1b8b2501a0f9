"""The commands of a node: which command, hand over, exit code.

    python entrypoint.py [run] [SCRIPT | -m MODULE] [ARGS...]    train (what `docker compose up` does)
    python entrypoint.py explain [--json] [SCRIPT ...]           what a start would use, and why
    python entrypoint.py doctor [--alone] [--json]               is this cluster fit to train? on all nodes at once
    python entrypoint.py bench [ARGS...]                         what the network gives; on all nodes at once
    python entrypoint.py report [--bundle FILE]                  what went wrong on this node, last time
    python entrypoint.py diagnose [FILE | -] [--json]            what the error in a log means, and its fix
    python entrypoint.py firewall                                rules that let only the nodes of this job in
    python entrypoint.py status [--json]                         what the job does at this moment, as this node knows it
    python entrypoint.py stacks [--json]                         where every rank of this node is; nothing is stopped
    python entrypoint.py notify --test                           tries the services of NOTIFY
    python entrypoint.py healthcheck                             waiting, running or stopping; for the engine
    python entrypoint.py --version

COMMAND --help tells more. Options before a script are the command's; what stands after it or after -- is the script's.
Settings come from the environment and from `.env` in the current folder; `.env.example` describes them.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from app.cli.arguments import command_of
from app.config.console import close_streams, open_streams, say
from app.config.errors import UserError
from app.config.project import VERSION

Command = Callable[[Sequence[str]], int]
# The one package that the launcher needs, for images that lack it: the image's own comes first.
sys.path += map(str, Path(__file__).parent.glob("app/lib/*.whl"))


def main(arguments: Sequence[str]) -> int:
    """Hands over to the command that the first argument names, `run` if it names none; returns the exit code."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if arguments[:1] == ["--version"]:
        print(f"torchrun-compose {VERSION}")
        return 0
    try:
        check_folder()
        name, rest = command_of(arguments, COMMANDS)
        return COMMANDS[name](rest)
    except UserError as error:
        from app.config.redaction import redact, settings_secrets
        from app.config.settings import read_settings

        say(redact(error.message, settings_secrets(read_settings(os.environ, env_file()))))
        return error.code


def check_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("The current folder was deleted. Change into the stack's folder again.") from None


def run(arguments: Sequence[str]) -> int:
    """Takes part in the job until it ends."""
    from app.cli.run import main as start

    return start(arguments, os.environ, env_file())


def explain(arguments: Sequence[str]) -> int:
    """Prints every decision of a start with its source and reason; starts nothing."""
    from app.cli.explain import main as tell

    return tell(arguments, os.environ, env_file())


def doctor(arguments: Sequence[str]) -> int:
    """Checks this node, and all nodes and pairs when they run it too; starts no training."""
    from app.doctor.command import main as examine

    return examine(arguments, os.environ, env_file())


def bench(arguments: Sequence[str]) -> int:
    """Measures collectives and pairs of nodes, in place of the training script; a failure is told, not tried again."""
    from app.bench.__main__ import options
    from app.cli.run import main as start

    options(arguments)
    return start(["-m", "app.bench", *arguments], {**os.environ, "MAX_RESTARTS": "0"}, env_file())


def report(arguments: Sequence[str]) -> int:
    """Prints the report of the last failure, or packs it with the logs into one archive without secrets."""
    from app.cli.report import main as tell

    return tell(arguments, os.environ, env_file())


def diagnose(arguments: Sequence[str]) -> int:
    """Names the known error in any log; 0 is known, 1 unknown."""
    from app.cli.diagnose import main as name

    return name(arguments)


def firewall(arguments: Sequence[str]) -> int:
    """Prints the firewall rules that let only this job's nodes in; changes nothing."""
    from app.cli.firewall import main as tell

    return tell(arguments, os.environ, env_file())


def status(arguments: Sequence[str]) -> int:
    """Tells what the launcher that runs here, its ranks and its machine do."""
    from app.cli.status import main as tell

    return tell(arguments)


def stacks(arguments: Sequence[str]) -> int:
    """Tells where every rank of this node is."""
    from app.cli.stacks import main as tell

    return tell(arguments)


def notify(arguments: Sequence[str]) -> int:
    """Sends a test message to each service of NOTIFY."""
    from app.cli.notify import main as test

    return test(arguments, os.environ, env_file())


def healthcheck(arguments: Sequence[str]) -> int:
    """Tells the engine how this node is doing; 0 is healthy."""
    from app.config.options import Parser
    from app.supervise.health import healthcheck as examine

    Parser(prog="healthcheck", description="0 when this node's launcher is alive, 1 when it is not.").read(arguments)
    return examine()


def env_file() -> Path:
    return Path(os.environ.get("ENV_FILE") or ".env")


COMMANDS: dict[str, Command] = {
    "run": run,
    "explain": explain,
    "doctor": doctor,
    "bench": bench,
    "report": report,
    "diagnose": diagnose,
    "firewall": firewall,
    "status": status,
    "stacks": stacks,
    "notify": notify,
    "healthcheck": healthcheck,
}

if __name__ == "__main__":
    open_streams()
    try:
        code = main(sys.argv[1:])
    finally:
        close_streams()
    sys.exit(code)
