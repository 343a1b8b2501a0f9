"""Who listens on a port of this machine. Asked only where a port that this node needs is taken."""

import contextlib
import os
import shlex


def holder(port: int) -> str:
    """Another process that listens on TCP `port`, for people; "" if there is none.

    Processes of other users and containers hide who they are."""
    import psutil

    listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    found = {one.pid for one in listening if one.laddr[1:] == (port,) and one.pid != os.getpid()}
    for pid in found - {None}:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            return f"process {pid} ({(shlex.join(process.cmdline()) or process.name())[:100]})"
    return f"another user or container (`sudo ss -ltnp 'sport = :{port}'` names it)" if found else ""
