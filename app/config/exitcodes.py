"""How the launcher ends. The numbers are an interface: Docker's restart policy and people's scripts act on them.

docs/exit-codes.md holds the same table with the reasons."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process that ran `entrypoint.py run` tells its parent."""

    DONE = 0
    """Every worker of every node ended with 0."""
    FAILED = 1
    """The launcher itself failed: a bug, with its traceback."""
    SETTINGS = 2
    """Settings or files that the user must change; nothing was started."""
    UNREACHABLE = 3
    """A node never came within START_TIMEOUT, or two nodes cannot connect."""
    DISAGREE = 4
    """The nodes do not agree: rank, node list, versions, script, or another job holds the port."""
    TRAINING = 5
    """The training script failed, and MAX_RESTARTS rounds without progress are used up, or another try is no use."""
    LOST = 6
    """A node was lost and did not come back within REJOIN_TIMEOUT."""
    UNTRUSTED = 7
    """The cluster token is missing on one side or differs."""
    STOPPED = 143
    """Stopped by the user before the training was done (128 + SIGTERM)."""
