"""Which texts are only a consequence: what ranks print whose peer has gone."""

import re

BARE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|Socket closed|"
    r"Timed out waiting|wait timeout after|Socket Timeout|connectFullMesh|DistNetworkError|DistStoreError|"
    r"NCCL communicator was aborted|remote process exited|recvValue failed|failed to recv",
    re.IGNORECASE,
)
"""Too short for the table of known errors, which would find them in healthy logs; an exception of these words has lost
its peer (gloo, c10d)."""


def is_consequence(text: str) -> bool:
    """Whether an exception of this text is explained by another rank's own words. What the table of known errors knows
    decides, and bare words of a lost connection where it knows nothing."""
    # The table costs 50 ms, and only bad days need it.
    from app.known_errors.diagnose import diagnose

    found = diagnose(text)
    return found.error.consequence if found else bool(BARE.search(text))
