"""`doctor`: this node's findings, then those of the whole cluster once the other nodes run it too."""

import argparse
import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from app.config.errors import UserError
from app.config.options import Parser
from app.config.redaction import redact, settings_secrets
from app.config.settings import Settings, read_settings
from app.doctor.collect.live import collect
from app.doctor.facts import Facts
from app.doctor.findings import Finding, Row, Value, from_sentence, wrong
from app.doctor.node_checks import check_node
from app.doctor.table import WORDS, exit_code, to_json, to_lines, to_table, verdict
from app.host import probe
from app.plan import Plan, draft
from app.plan.node_list import names_to_resolve
from app.plan.script import files_to_look_at


def main(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path | None) -> int:
    """Prints the table; 0 if nothing is red, 1 if something is, 2 for wrong arguments."""
    wanted = options(arguments)
    facts = gather_facts(read_settings(environ, env_file))
    rows: Sequence[Row] = [own_row(facts)]
    # A node alone with several workers has a collective to try, and nobody to meet.
    if facts.plan and facts.plan.world_size > 1 and not wanted.alone:
        rows = with_others(facts, facts.plan, rows[0], wanted.wait)
    print(shown([without_secrets(row, facts) for row in rows], as_json=wanted.json))
    return exit_code(rows)


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """`alone`, `json` and `wait` (seconds)."""
    parser = Parser(
        prog="doctor",
        description="Is this cluster fit to train? Run it on all nodes at once.",
        epilog="Exit code: 0 when nothing is red, 1 when something is, 2 for wrong arguments.",
    )
    parser.add_argument("--alone", action="store_true", help="only what this node knows by itself")
    parser.add_argument("--json", action="store_true", help="findings as JSON on standard output")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds that the other nodes have to come (60)")
    return parser.read(arguments)


def with_others(facts: Facts, plan: Plan, own: Row, wait: float) -> Sequence[Row]:
    """The table of all nodes, or of this one with the reason why there is no other."""
    from app.config.console import say
    from app.doctor.collect.collective import all_reduce
    from app.doctor.participant import meet
    from app.gang.connect import NoAnswerError
    from app.gang.probes import why
    from app.gang.token import read_token

    say_own(own, say, "waiting for the other nodes" if plan.nodes.count > 1 else "trying a collective")
    try:
        token = read_token(plan)
        return asyncio.run(stoppable(meet(facts, plan, token, own.findings, say, all_reduce, wait)))
    except UserError as error:
        return [_with(own, wrong("settings-wrong", sentence=error.message))]
    except NoAnswerError as error:
        absent = wrong("coordinator-missing", reason=str(error))
        node0 = Row(rank=0, address=plan.nodes.addresses[0], findings=(absent,))
        return [node0, own] if own.rank else [_with(own, absent)]
    except OSError as error:
        net = plan.network
        values: dict[str, Value] = {"address": net.address, "master": net.master_port, "control": net.control_port}
        return [_with(own, wrong("cannot-listen", None, reason=why(error), **values))]


async def stoppable(work: Coroutine[None, None, Sequence[Row]]) -> Sequence[Row]:
    """Lets `docker stop` and Ctrl-C end the work in order: nothing stays behind. Raises SystemExit then."""
    task = asyncio.ensure_future(work)
    stops: list[int] = []

    def stop(number: int) -> None:
        stops.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        raise SystemExit(128 + stops[0] if stops else 1) from None


def say_own(own: Row, say: Callable[[str], None], then: str) -> None:
    """What this node found by itself, at once: the others may take a while."""
    for each in own.findings:
        if each.bad:
            say(f"{each.check} {WORDS[each.severity]}: {each.sentence}")
    say(f"this node alone: {verdict([own]).partition(', ')[2]}; {then}")


def _with(own: Row, finding: Finding) -> Row:
    return Row(rank=own.rank, address=own.address, findings=(*own.findings, finding))


def gather_facts(settings: Settings, root: Path = Path("/")) -> Facts:
    """The machine, the plan, and the live facts of doctor."""
    name = socket.gethostname()
    host = probe(root, resolve=(*names_to_resolve(settings), name), paths=files_to_look_at(settings))
    found = draft(settings, host)
    live = collect(root, host, found.plan.script.checkpoint_dir if found.plan else None)
    return Facts(host=host, draft=found, live=live, secrets=settings_secrets(settings))


def own_row(facts: Facts) -> Row:
    """Without secrets: the other nodes get it."""
    plan = facts.plan
    rank, address = (plan.nodes.rank, plan.network.address) if plan else (-1, facts.host.hostname)
    return without_secrets(Row(rank=rank, address=address, findings=check_node(facts)), facts)


def without_secrets(row: Row, facts: Facts) -> Row:
    def clean(finding: Finding) -> Finding:
        values = {
            name: redact(value, facts.secrets) if isinstance(value, str) else value
            for name, value in finding.values.items()
        }
        sentence, fix = redact(finding.sentence, facts.secrets), redact(finding.fix, facts.secrets)
        return from_sentence(finding.id, finding.check, finding.severity, sentence, fix, values)

    return replace(row, findings=tuple(map(clean, row.findings)))


def shown(rows: Sequence[Row], *, as_json: bool) -> str:
    """For people on a terminal, or where COLUMNS names a width; for grep elsewhere, for programs with --json."""
    if as_json:
        return to_json(rows)
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return to_table(rows, shutil.get_terminal_size().columns, colour="NO_COLOR" not in os.environ)
    return to_lines(rows)
