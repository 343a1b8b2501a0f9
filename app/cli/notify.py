"""`notify --test`: sends one message to each service of NOTIFY, and tells which took it."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.config.errors import UserError
from app.config.options import Parser
from app.config.settings import read_settings
from app.supervise.files import in_time
from app.supervise.notify import LIMIT, TITLES, deliver, scheme


def main(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path) -> int:
    """0 when every service took the message, 1 otherwise. Raises UserError where NOTIFY is not set."""
    parser = Parser(prog="notify", description="Tries the services of NOTIFY. 0 when each took its message, else 1.")
    parser.add_argument("--test", action="store_true", help="send one message to each service")
    if not parser.read(arguments).test:
        raise UserError("notify sends nothing by itself: `notify --test` tries the services of NOTIFY.")
    settings = read_settings(environ, env_file)
    if wrong := [each for each in settings.problems if each.setting == "NOTIFY"]:
        raise UserError(wrong[0].message)
    if settings.notify is None:
        raise UserError("NOTIFY is not set: write one or more of Apprise's addresses into secrets/env or .env.")
    nature, what = TITLES["test"]
    title, codes = f"torchrun-compose: {settings.run_name.value} {what}", []
    for number, service in enumerate(settings.notify.value, 1):
        try:
            why = in_time(functools.partial(deliver, service, nature, title, "A test message."), LIMIT)
        except TimeoutError:
            why = f"no answer within {LIMIT:.0f} s"
        print(f"service {number} ({scheme(service)}): {why or 'took the message'}")
        codes.append(bool(why))
    return int(any(codes))
