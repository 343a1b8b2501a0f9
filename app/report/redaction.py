"""The secrets of a start, by its plan."""

from collections.abc import Mapping

from app.config.redaction import secrets_of
from app.plan import Plan


def plan_secrets(plan: Plan | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Those of a start with this environment; its own variables alone while there is no plan."""
    if plan is None:
        return secrets_of(environ)
    notify = {"NOTIFY": " ".join(plan.monitoring.notify)}
    return secrets_of({**environ, **plan.script.env, **notify}, [plan.token_file])
