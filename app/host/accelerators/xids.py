"""Errors of GPUs in the kernel's log, which only root outside a container may read."""

import contextlib
import os
import re
from pathlib import Path

RECORD = 1 << 13


def read_xids(log: str, since: float = 0.0) -> tuple[tuple[str, int], ...]:
    """(PCI address, Xid) of each kind of error that the NVIDIA driver has logged, in order of appearance; `since` is in
    seconds since the machine started, and leaves out what is older."""
    found = []
    for line in log.splitlines():
        error = re.search(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)", line)
        stamp = re.match(r"\d+,\d+,(\d+)[,;]", line)
        if error and (not stamp or int(stamp[1]) / 1e6 >= since):
            found.append((error[1], int(error[2])))
    return tuple(dict.fromkeys(found))


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
