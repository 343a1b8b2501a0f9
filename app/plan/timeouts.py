"""How long the nodes wait for each other, how often they start again, with how few nodes."""

import re

from app.config.settings import Settings
from app.host import Host
from app.plan.decisions import Ledger, count, shown
from app.plan.node_list import NodeList

ENDING = 5
"""Seconds that a launcher takes to end what is left after STOP_GRACE."""


def decide_times(settings: Settings, host: Host, member: NodeList | None, ledger: Ledger) -> int:
    """Records how long the nodes wait for each other, and how often they try; returns the fewest nodes of a round."""
    for name, reason in (
        ("START_TIMEOUT", "seconds until all nodes must have answered"),
        ("REJOIN_TIMEOUT", "seconds that a lost node has to come back"),
        ("HEARTBEAT_TIMEOUT", "seconds of silence after which a node counts as lost"),
        ("STOP_GRACE", "seconds for workers to save their state when stopped"),
        ("MAX_RESTARTS", "new rounds after a failure"),
        ("HANG_REPORT", "seconds without a move of any rank until the nodes say who waits for whom; 0 is never"),
        ("HANG_TIMEOUT", "seconds without a move of any rank that count as a failure"),
        ("STOPPED_EXIT_CODE", "exit code when the job is stopped on another node"),
    ):
        value = settings.get(name)
        if value is not None:
            ledger.take(name, value, reason)
    _check_grace(settings, host, ledger)
    least = settings.values.get("MIN_NODES")
    size = len(member.addresses) if member is not None else None
    if least is None:
        return size or 1
    ledger.take("MIN_NODES", least, "a restart may go on with fewer nodes, down to these")
    if size is not None and int(least.text) > size:
        ledger.refuse(
            "MIN_NODES", f"{shown('MIN_NODES', least)}, but the job has {count(size, 'node')}. Set at most {size}."
        )
    return int(least.text)


def _check_grace(settings: Settings, host: Host, ledger: Ledger) -> None:
    period = settings.values.get("STOP_GRACE_PERIOD")
    waits = _compose_seconds(period.text if period else "60s")
    grace = settings.get("STOP_GRACE")
    if host.container and grace is not None and waits is not None and float(grace.text) + ENDING > waits:
        ledger.warn(
            f"{shown('STOP_GRACE', grace)} is more than Docker waits (STOP_GRACE_PERIOD, {waits:g} s): workers would "
            f"be killed while they save. Set STOP_GRACE_PERIOD={float(grace.text) + ENDING:g}s or more in .env."
        )


def _compose_seconds(text: str) -> float | None:
    """Seconds of a duration as Compose writes it, `1m30s`; None if it is none."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6}
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|us|h|m|s)", text)
    known = parts and "".join(number + unit for number, unit in parts) == text
    return sum(float(number) * units[unit] for number, unit in parts) if known else None
