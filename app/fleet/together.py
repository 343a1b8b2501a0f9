"""`doctor`, `bench`, `explain`, `run` on all nodes at once, and `shell` on one: in the trainer's image."""

import asyncio
import functools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from app.config.errors import UserError, printable
from app.config.options import Parser
from app.config.table import columns
from app.fleet.hosts import Desk, Host
from app.fleet.logs import Reader, print_merged
from app.fleet.remote import SSH_FAILED, Result, complaints, contact, everywhere, remote, ssh, stream
from app.fleet.stack import in_stack, run_trainer

DOCTOR = 300.0
EXPLAIN = 120.0
WIDEST = 60
"""Columns of one value in the table of `explain`."""


def doctor(desk: Desk, arguments: Sequence[str]) -> int:
    """One table for all nodes, as each of them makes it; 1 when something is red."""
    if {"-h", "--help"} & {*arguments}:
        Parser(prog="doctor", description="Is this cluster fit to train? Takes doctor's own options.").read(["--help"])
    # A terminal gets the table, as it would on a node.
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    options = (f"--env=COLUMNS={shutil.get_terminal_size().columns}", "--env=NO_COLOR=1") if wide else ()
    asked = functools.partial(run_trainer, options=options)
    results = asyncio.run(
        everywhere(desk, lambda host: asked(desk, host, "doctor", *arguments), what="doctor", deadline=DOCTOR)
    )
    said = [each for each in results if each.out.strip()]
    # Every node ends with the table of all; with --alone each has its own.
    shown = said[:1] if len({each.out for each in said}) == 1 or "--alone" not in arguments else said
    for each in shown:
        print(each.text)
    complaints(each for each in results if not each.out.strip())
    return max(each.code for each in results)


def bench(desk: Desk, arguments: Sequence[str]) -> int:
    """What the network gives, as node 0 measures it with all others."""
    if {"-h", "--help"} & {*arguments}:
        Parser(prog="bench", description="Measures the network between all hosts. Takes bench's own options.").read(
            ["--help"]
        )
    return asyncio.run(_streamed(desk, ["bench", *arguments], None))


def run(desk: Desk, arguments: Sequence[str]) -> int:
    """A command in the trainer's image on all hosts; the worst exit code."""
    words = list(arguments[1:] if arguments[:1] == ["--"] else arguments)
    if not words or words[0].startswith("-"):
        about = "A command in the trainer's image on all hosts: run -- nvidia-smi -L"
        Parser(prog="run", description=about, usage="torchrun-compose run -- COMMAND ...").read(words or ["--help"])
    return asyncio.run(_streamed(desk, words[1:], words[0]))


async def _streamed(desk: Desk, words: Sequence[str], program: str | None) -> int:
    codes = dict[Host, int]()
    streams = {}
    dead = complaints(await contact(desk))
    for host in desk.hosts:
        if host in dead:
            codes[host] = SSH_FAILED
        else:
            command = run_trainer(desk, host, *words, entrypoint=program)
            streams[Reader(host)] = stream(host, command, functools.partial(codes.__setitem__, host))
    await print_merged(streams)
    return max(codes.values(), default=1)


def explain(desk: Desk, arguments: Sequence[str]) -> int:
    """What differs between the nodes, or with `--all` every decision; 1 where a node cannot start."""
    parser = Parser(prog="explain", description="What a start would use on each node, and what differs between them.")
    parser.add_argument("--all", action="store_true", help="also what is equal on all nodes")
    wanted = parser.read(arguments)
    results = asyncio.run(
        everywhere(desk, lambda host: run_trainer(desk, host, "explain", "--json"), what="explain", deadline=EXPLAIN)
    )
    told = [(each, _decoded(each)) for each in results]
    plans = {each.host: plan for each, plan in told if plan}
    if plans:
        print("\n".join(differences(plans, everything=wanted.all)))
    complaints(each for each, plan in told if plan is None)
    return int(any(plan is None or plan["problems"] for _, plan in told))


def _decoded(result: Result) -> dict[str, Any] | None:
    try:
        found = json.loads(result.out)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"decisions", "warnings", "problems"} <= found.keys() else None


def differences(plans: dict[Host, dict[str, Any]], *, everything: bool = False) -> list[str]:
    """A table of decisions by nodes, and what each of them warns of."""
    values: dict[str, dict[Host, str]] = {}
    for host, plan in plans.items():
        for each in plan["decisions"]:
            values.setdefault(str(each["name"]), {})[host] = printable(str(each["value"]))
    differing = {name: row for name, row in values.items() if len(row) < len(plans) or len({*row.values()}) > 1}
    shown = values if everything else differing
    rows = [("", *(host.name for host in plans))]
    rows += [(name, *(_cut(row.get(host, "-")) for host in plans)) for name, row in shown.items()]
    lines = columns(rows) if len(rows) > 1 else []
    lines.append(f"{len(values) - len(differing)} of {len(values)} decisions are equal on all {len(plans)} nodes")
    for kind in ("warnings", "problems"):
        said: dict[str, list[str]] = {}
        for host, plan in plans.items():
            for each in plan[kind]:
                said.setdefault(printable(str(each["message"])), []).append(host.name)
        lines += [f"{kind[:-1]} ({', '.join(names)}): {text}" for text, names in said.items()]
    return lines


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def shell(desk: Desk, arguments: Sequence[str]) -> int:
    """A shell in the running trainer of one host, or in a fresh container of its image."""
    parser = Parser(prog="shell", description="A shell in the trainer of one host; a fresh one where none runs.")
    parser.add_argument("node", metavar="NODE", help="a host's name or rank")
    wanted = parser.read(arguments)
    (host,) = desk.only([wanted.node]).hosts
    script = (
        'if [ -n "$(docker compose ps --quiet --status running trainer)" ]\n'
        "then exec docker compose exec trainer bash\n"
        "else exec docker compose run --rm --no-deps --entrypoint bash trainer; fi"
    )
    command = [*ssh(host, interactive=True), remote(in_stack(desk, host, script))]
    try:
        os.execvp("ssh", [command[0], "-t", *command[1:]])  # noqa: S606 - the user's own ssh takes over the terminal
    except OSError as error:
        raise UserError(f"ssh cannot be started: {error.strerror}.") from None
