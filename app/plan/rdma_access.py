"""What stands between this process and the RDMA ports of the machine."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.host import Host
from app.host.rdma import RdmaPort

ENOUGH_MEMLOCK = 64 << 20
"""Bytes. NCCL registers several MiB per channel and peer; Docker's default is 64 KiB to 8 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    id: str
    why: str
    fix: str


def obstacle(host: Host, ports: Sequence[RdmaPort]) -> Obstacle | None:
    """Why NCCL could not open these ports here."""
    software = host.rdma_software
    missing = [port for port in ports if not port.openable]
    if missing and not software.dev_infiniband:
        fix = "Set HARDWARE=nvidia-ib" if host.container else "Load the kernel module ib_uverbs"
        return Obstacle(id="no-device-nodes", why="/dev/infiniband is missing", fix=fix)
    if missing:
        nodes = ", ".join(f"/dev/infiniband/{port.uverbs or 'uverbs?'} ({port.device})" for port in missing)
        fix = "Set HARDWARE=nvidia-ib, which hands over all of them" if host.container else "Check its permissions"
        return Obstacle(id="not-openable", why=f"{nodes} is missing or not open to user {host.uid}", fix=fix)
    if not software.library:
        fix = "Add the package libibverbs1 to the image"
        return Obstacle(id="no-libibverbs", why="libibverbs.so.1 is not installed", fix=fix)
    if not software.providers:
        fix = "Add the package ibverbs-providers to the image"
        return Obstacle(id="no-provider", why="no driver of libibverbs is installed", fix=fix)
    return None


def memlock_obstacle(host: Host) -> Obstacle | None:
    """Why cards could not register memory. Source: ib_umem_get in the kernel's umem.c."""
    limit = host.limits.memlock
    if limit is None or limit >= ENOUGH_MEMLOCK or host.limits.may_lock:
        return None
    fix = "Run `ulimit -l unlimited` first"
    if host.container:
        fix = "Set HARDWARE=nvidia-ib, which lifts it (a rootless engine needs LimitMEMLOCK=infinity in its service)"
    why = f"the limit of locked memory is {limit >> 10} KiB, and RDMA registers more"
    return Obstacle(id="memlock", why=why, fix=fix)
