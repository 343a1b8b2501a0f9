"""The secret that the nodes of one cluster share."""

from app.config.console import say
from app.config.errors import UserError
from app.plan import Plan
from app.plan.script import SHORTEST_TOKEN


def read_token(plan: Plan) -> bytes:
    """The cluster token; b"" without one. Raises UserError."""
    if plan.token_file is None:
        if plan.nodes.count > 1:
            say("warning: without CLUSTER_TOKEN_FILE whoever reaches CONTROL_PORT can join or stop this job")
        return b""
    try:
        token = plan.token_file.read_bytes().strip()
    except OSError as error:
        raise UserError(f"CLUSTER_TOKEN_FILE={plan.token_file} cannot be read: {error.strerror}.") from None
    if len(token) < SHORTEST_TOKEN:
        fix = "Make one with `openssl rand -hex 32` and copy it to all nodes."
        raise UserError(f"CLUSTER_TOKEN_FILE={plan.token_file} holds only {len(token)} bytes. {fix}")
    return token
