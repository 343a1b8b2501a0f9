"""The kernel's log, which only root outside a container may read."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

RECORD = 1 << 13


def lines_since(log: str, since: float) -> Iterator[str]:
    """The lines of `log` without those older than `since`, in seconds since the machine started."""
    for line in log.splitlines():
        stamp = re.match(r"\d+,\d+,(\d+)[,;]", line)
        if not stamp or int(stamp[1]) / 1e6 >= since:
            yield line


def kernel_log(device: Path = Path("/dev/kmsg")) -> str:
    """ "" where it may not be read. One read gives one record, `priority,number,microseconds,-;text` (kernel:
    Documentation/ABI/testing/dev-kmsg); EPIPE says that records were overwritten meanwhile."""
    records = list[bytes]()
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        log = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
        stack.callback(os.close, log)
        while not records or records[-1]:
            with contextlib.suppress(BrokenPipeError):
                records.append(os.read(log, RECORD))
    return b"".join(records).decode(errors="replace")
