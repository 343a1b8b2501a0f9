"""How long the nodes wait for each other, how often they start again, with how few nodes, and with how many spares."""

from app.config.settings import Settings
from app.host import Host
from app.plan.decisions import Ledger
from app.plan.parts import Timeouts

ENDING = 5
"""Seconds that a launcher takes to end what is left after STOP_GRACE."""


def decide_timeouts(settings: Settings, host: Host, ledger: Ledger) -> Timeouts:
    """How long the nodes wait for each other; records also how often they try."""
    for value, reason in (
        (settings.start_timeout, "seconds until all nodes must have answered"),
        (settings.rejoin_timeout, "seconds that a lost node has to come back"),
        (settings.heartbeat_timeout, "seconds of silence after which a node counts as lost"),
        (settings.stop_grace, "seconds for workers to save their state when stopped"),
        (settings.max_restarts, "new rounds after a failure"),
        (settings.hang_report, "seconds without progress of any rank until the nodes say who waits for whom; 0: never"),
        (settings.hang_timeout, "seconds without progress of any rank that count as a failure"),
        (settings.stopped_exit_code, "exit code when the job is stopped on another node"),
    ):
        if value is not None:
            ledger.take("timeouts", value, reason)
    _check_grace(settings, host, ledger)
    return Timeouts(
        start=settings.start_timeout.value,
        rejoin=settings.rejoin_timeout.value,
        stop_grace=settings.stop_grace.value,
        heartbeat=settings.heartbeat_timeout.value,
        hang_report=settings.hang_report.value,
        hang_timeout=settings.hang_timeout.value if settings.hang_timeout else 0.0,
    )


def decide_minimum(settings: Settings, size: int | None, ledger: Ledger) -> int:
    """The fewest nodes of a round; `size` is None where the nodes are not known."""
    least, spares = settings.min_nodes, settings.spares
    if spares.value:
        ledger.take("timeouts", spares, "of the nodes wait, and take the place of those that are lost")
    training = (size or 1) - spares.value
    if size is not None and training < 1:
        ledger.refuse("timeouts.spares", given=spares, nodes=size, most=size - 1)
    if least is None:
        return max(1, training)
    ledger.take("timeouts", least, "a restart may go on with fewer nodes, down to these")
    ledger.take("timeouts", settings.regrow, "what lets a node that comes back in again")
    if size is not None and least.value > training >= 1:
        ledger.refuse("timeouts.min-nodes", given=least, nodes=training)
    return least.value


def _check_grace(settings: Settings, host: Host, ledger: Ledger) -> None:
    waits, grace = settings.stop_grace_period.value, settings.stop_grace
    if host.container and waits is not None and grace.value + ENDING > waits:
        ledger.warn("timeouts.stop-grace", given=grace, waits=waits, needed=grace.value + ENDING)
