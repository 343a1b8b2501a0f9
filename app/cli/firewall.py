"""`firewall`: prints the rules that close this job's ports to everybody but its nodes; changes nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from app.config.errors import UserError
from app.config.options import Parser
from app.config.problems import refusal
from app.config.settings import read_settings
from app.plan import Plan, make_plan, probe_for
from app.plan.firewall import ruleset


def main(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path) -> int:
    """Prints a file for `nft -f`. Raises UserError for wrong settings, and where the nodes' addresses are not known."""
    Parser(prog="firewall", description="Prints rules for `nft -f`; changes nothing.").read(arguments)
    settings = read_settings(environ, env_file)
    host = probe_for(settings)
    plan = make_plan(settings, host)
    if not isinstance(plan, Plan):
        raise refusal(plan)
    try:
        print(ruleset(plan.nodes, plan.network, host.ephemeral_ports))
    except ValueError as error:
        raise UserError(f"no rules can be made: {error}. Set NODES to the addresses of all nodes.") from None
    return 0
