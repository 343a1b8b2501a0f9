"""Which command the arguments of the entrypoint name, and what is wrong with them before any setting is read."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from app.config.errors import UserError, printable


def command_of(arguments: Sequence[str], commands: Iterable[str]) -> tuple[str, Sequence[str]]:
    """The command and what follows it; `run` where the first argument is a script. Raises UserError."""
    first = arguments[0] if arguments else ""
    if first in commands:
        return first, arguments[1:]
    if first.startswith("-") and first != "-m":
        raise UserError(
            f"unknown option {printable(first)}. `--help` lists the commands; `run -- {printable(first)} ...` hands it "
            "to the script of TRAIN_SCRIPT."
        )
    if first and not set(first) & {".", "/"} and not Path(first).exists():
        import difflib

        near = difflib.get_close_matches(first, commands, n=1, cutoff=0.7)
        if near:
            raise UserError(f"{printable(first)} is neither a command nor a script. Did you mean {near[0]}?")
    return "run", arguments
