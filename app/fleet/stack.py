"""The compose stack of a host: how its commands are written."""

import os
import re
import shlex
from collections.abc import Mapping

from app.config.settings import TABLE
from app.config.values import Value
from app.fleet.hosts import Desk, Host

OUTSIDE = {"WORKSPACE": "./workspace", "CLUSTER_TOKEN_FILE": "./secrets/cluster_token"}
"""Paths of the desk that `push` brings to these places of the project's folder."""
OWN = ("ENV_FILE", "NODE_RANK", "STACK_DIR")
"""What a shell sets for one machine alone."""
PASSED = re.compile(r"(TRAIN|NCCL|GLOO|TORCH)_[A-Z0-9_]+")


def exports(desk: Desk, host: Host, environ: Mapping[str, str]) -> dict[str, str]:
    """What the host's shell is given over its `.env`: this shell's own settings, and what differs on hosts."""
    settings = desk.settings
    given = {name: text for name, text in environ.items() if PASSED.fullmatch(name)}
    for each in TABLE:
        value: Value[object] | None = settings.of(each.name)
        here = each.scope == "desk" or each.name in OWN
        # What is secret would stand in the command line of ssh, for all to see.
        if value and value.source == "environment" and not value.secret and not here:
            given[each.name] = value.text
    given |= {name: place for name, place in OUTSIDE.items() if settings.text(name) and settings.text(name) != place}
    if settings.nodes is None and len(desk.hosts) > 1:
        given["NODE_RANK"] = str(host.rank)
    return given


def compose(desk: Desk, host: Host, *words: str) -> str:
    """A command line for `docker compose` in the project's folder on a host."""
    return in_stack(desk, host, f"exec docker compose --ansi never {shlex.join(words)}")


def in_stack(desk: Desk, host: Host, script: str) -> str:
    """Lines of sh in the project's folder, with the settings of the stack."""
    folder = shlex.quote(desk.folder)
    lines = [f"cd {folder} 2>/dev/null || {{ echo 'no project here yet' >&2; exit 1; }}"]
    # Of the stack's name, as in a shell there.
    lines.append("export PWD")
    if not desk.settings.text("RUN_AS"):
        # What the script writes is the user's own there, as the files of its folder are.
        lines.append('[ "$(id -u)" = 0 ] || export RUN_AS="$(id -u):$(id -g)"')
    lines += [f"export {name}={shlex.quote(text)}" for name, text in exports(desk, host, os.environ).items()]
    return "\n".join([*lines, script])


def run_trainer(
    desk: Desk, host: Host, *words: str, entrypoint: str | None = None, options: tuple[str, ...] = ()
) -> str:
    """A command line for a container of its own in the trainer's image, beside the job's."""
    chosen = ["--entrypoint", entrypoint] if entrypoint is not None else []
    return compose(desk, host, "run", "--rm", "--no-TTY", "--no-deps", *options, *chosen, "trainer", *words)
