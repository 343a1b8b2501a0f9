"""Command lines of our commands: argparse with our errors, and the line between our options and a script's."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from app.config.errors import UserError, printable


class Parser(argparse.ArgumentParser):
    """The options of one command. Wrong ones are a UserError that names them."""

    def __init__(self, prog: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, usage=usage, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{printable(message)}. `{self.prog} --help` lists the options.")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        found, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(f"unknown {'option' if unknown[0].startswith('-') else 'argument'} {unknown[0]}")
        return found


def script_line(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Our options, and the script with its arguments: what stands after it or after `--` is the script's."""
    for index, word in enumerate(arguments):
        if word == "--":
            return arguments[:index], arguments[index + 1 :]
        if word == "-m" or not word.startswith("-"):
            return arguments[:index], arguments[index:]
    return arguments, ()
