"""Texts that are only a consequence: what workers print whose peer has gone."""

import re

CASCADE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|connectFullMesh|"
    r"Timed out waiting \d+ms|wait timeout after|Socket Timeout|DistNetworkError|DistStoreError|"
    r"ncclRemoteError|remote process exited|NCCL communicator was aborted|collective operation timeout|"
    r"recvValue failed|failed to recv, got 0 bytes",
    re.IGNORECASE,
)
"""What workers say whose peer has gone (texts of gloo, NCCL and c10d; measured, or found in torch 2.13's binaries)."""
