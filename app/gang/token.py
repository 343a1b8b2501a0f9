"""The secret that the nodes of one cluster share."""

import stat

from app.config.console import say
from app.config.errors import UserError
from app.config.problems import text_of
from app.plan import Plan
from app.plan.script import SHORTEST_TOKEN

FEWEST = 8
"""Different bytes of a token that was drawn by chance; a word or a date has fewer."""


def read_token(plan: Plan) -> bytes:
    """The cluster token; b"" without one. Warns of one that others can read or guess. Raises UserError."""
    if plan.token_file is None:
        if plan.nodes.count > 1:
            say("warning: without CLUSTER_TOKEN_FILE whoever reaches CONTROL_PORT can join or stop this job")
        return b""
    make = text_of("settings.token-file")["fix"]
    named = f"CLUSTER_TOKEN_FILE={plan.token_file}"
    try:
        token, mode = plan.token_file.read_bytes().strip(), plan.token_file.stat().st_mode
    except OSError as error:
        raise UserError(f"{named} cannot be read: {error.strerror}.") from None
    if len(token) < SHORTEST_TOKEN:
        raise UserError(f"{named} holds only {len(token)} bytes. {make}.")
    if mode & stat.S_IROTH:
        told = f"can be read by every user of this machine (mode {stat.S_IMODE(mode):04o})"
        say(f"warning: {named} {told}. Fix: chmod 0400 on that file of the host")
    if len(set(token)) < FEWEST:
        say(f"warning: {named} is easy to guess. {make}")
    return token
