"""`doctor`: this node's findings, then those of the whole cluster once the other nodes run it too."""

import argparse
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.doctor.checks import check_node
from app.doctor.facts import Facts
from app.doctor.findings import Row
from app.doctor.look import look
from app.doctor.table import exit_code, to_json, to_lines, to_table
from app.launch.host import probe
from app.launch.membership import names_to_resolve
from app.launch.plan import draft
from app.launch.script import files_to_look_at
from app.launch.settings import Settings, read_settings


def main(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path | None) -> int:
    """Prints the table; 0 if nothing is red, 1 if something is, 2 for wrong arguments."""
    wanted = options(arguments)
    settings = read_settings(environ, env_file)
    facts = gather_facts(settings)
    rows = [own_row(facts)]
    print(shown(rows, as_json=wanted.json))
    return exit_code(rows)


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """`json`."""
    parser = argparse.ArgumentParser(prog="doctor", description="Is this cluster fit to train?")
    parser.add_argument("--json", action="store_true", help="findings as JSON on standard output")
    return parser.parse_args(arguments)


def gather_facts(settings: Settings, root: Path = Path("/")) -> Facts:
    """The machine, the plan, and the live facts of doctor."""
    name = socket.gethostname()
    host = probe(root, resolve=(*names_to_resolve(settings), name), paths=files_to_look_at(settings))
    found = draft(settings, host)
    return Facts(host=host, draft=found, look=look(root, host, found.plan.checkpoint_dir if found.plan else None))


def own_row(facts: Facts) -> Row:
    plan = facts.plan
    findings = check_node(facts)
    if plan is None:
        return Row(rank=-1, address=facts.host.hostname, findings=findings)
    return Row(rank=plan.node_rank, address=plan.address, findings=findings)


def shown(rows: Sequence[Row], *, as_json: bool) -> str:
    """For people on a terminal, for grep elsewhere, for programs with --json."""
    if as_json:
        return to_json(rows)
    if sys.stdout.isatty():
        return to_table(rows, shutil.get_terminal_size().columns, colour="NO_COLOR" not in os.environ)
    return to_lines(rows)
