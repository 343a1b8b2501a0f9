"""Who is told of the job: Prometheus, and the services of NOTIFY."""

from app.config.problems import count
from app.config.settings import Settings
from app.plan.decisions import Ledger
from app.plan.parts import Monitoring


def decide_monitoring(settings: Settings, ledger: Ledger) -> Monitoring:
    """Off unless it is asked for."""
    metrics, notify = settings.metrics_port, settings.notify
    if metrics:
        address, port = metrics.value
        where = "this machine only" if address.startswith("127.") or address == "::1" else "whoever reaches it"
        ledger.take("ports", metrics, f"figures for Prometheus at http://{address}:{port}/metrics, for {where}")
    if notify:
        told = f"{count(len(notify.value), 'service')} to tell of starts, failures and the end"
        ledger.take("settings", notify, told)
    return Monitoring(metrics=metrics.value if metrics else None, notify=notify.value if notify else ())
