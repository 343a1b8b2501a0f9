"""What stands between this process and the RDMA ports of the machine."""

from collections.abc import Sequence

from app.config.problems import Problem, problem
from app.host import Host
from app.host.rdma import RdmaPort

ENOUGH_MEMLOCK = 64 << 20
"""Bytes. NCCL registers several MiB per channel and peer; Docker's default is 64 KiB to 8 MiB."""


def obstacle(host: Host, ports: Sequence[RdmaPort], layer: str) -> Problem | None:
    """Why NCCL could not open these ports here."""
    software, inside = host.rdma_software, host.container
    missing = [port for port in ports if not port.openable]
    if missing and not software.dev_infiniband:
        return problem("rdma.no-device-nodes", "severe", layer=layer, inside=inside)
    if missing:
        nodes = [f"/dev/infiniband/{port.uverbs or 'uverbs?'} ({port.device})" for port in missing]
        return problem("rdma.not-openable", "severe", layer=layer, inside=inside, nodes=nodes, uid=host.uid)
    if not software.library:
        return problem("rdma.no-libibverbs", "severe", layer=layer, inside=inside)
    if not software.providers:
        return problem("rdma.no-provider", "severe", layer=layer, inside=inside)
    return None


def memlock_obstacle(host: Host, transport: str) -> Problem | None:
    """Why cards could not register memory. Source: ib_umem_get in the kernel's umem.c."""
    limit = host.limits.memlock
    if limit is None or limit >= ENOUGH_MEMLOCK or host.limits.may_lock:
        return None
    kib = limit >> 10
    return problem("rdma.memlock", setting="memlock", transport=transport, limit=kib, inside=host.container)
