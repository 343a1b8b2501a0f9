"""What stands between this process and the RDMA ports of the machine: one sentence with its cure, or nothing."""

from collections.abc import Sequence

from app.host import Host
from app.host.rdma import RdmaPort

ENOUGH_MEMLOCK = 64 << 20
"""Bytes. NCCL registers several MiB per channel and peer; Docker's default is 64 KiB to 8 MiB."""


def obstacle(host: Host, ports: Sequence[RdmaPort]) -> str:
    """Why NCCL could not open these ports here, and what to do; empty if it can."""
    software = host.rdma_software
    missing = [port for port in ports if not port.openable]
    if missing and not software.dev_infiniband:
        cure = "set HARDWARE=nvidia-ib" if host.container else "load the kernel module ib_uverbs"
        return f"/dev/infiniband is not here: {cure}"
    if missing:
        nodes = ", ".join(f"/dev/infiniband/{port.uverbs or 'uverbs?'} ({port.device})" for port in missing)
        cure = "set HARDWARE=nvidia-ib, which hands over all of them" if host.container else "check its permissions"
        return f"{nodes} is missing or not open to user {host.uid}: {cure}"
    if not software.library:
        return "libibverbs.so.1 is not installed: add the package libibverbs1 to the image"
    if not software.providers:
        return "no driver of libibverbs is installed: add the package ibverbs-providers to the image"
    return ""


def memlock_obstacle(host: Host) -> str:
    """Why cards could not register memory; empty if they can. Source: ib_umem_get in the kernel's umem.c."""
    limit = host.limits.memlock
    if limit is None or limit >= ENOUGH_MEMLOCK or host.limits.may_lock:
        return ""
    cure = "run `ulimit -l unlimited` first"
    if host.container:
        cure = "set HARDWARE=nvidia-ib, which lifts it (a rootless engine needs LimitMEMLOCK=infinity in its service)"
    return f"the limit of locked memory is {limit >> 10} KiB, and RDMA registers more: {cure}"
