"""Does the training really use InfiniBand or RoCE? The kernel's byte counters tell, whatever NCCL prints."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.host.files import entries, number
from app.plan import Plan
from app.supervise.files import off_loop

CHECK_EVERY = 5.0
ENOUGH = 1 << 30
"""Bytes after which it is clear which way they go: a small model on a few GPUs sends as much in a minute."""
CHECKS = 720
READ = 30.0
"""Seconds for the counters: a driver that hangs must hold up nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes sent since the machine started."""

    rdma: int | None
    """None where a port's driver does not count: what it sends cannot be told from nothing."""
    interface: int


def watched(plan: Plan) -> bool:
    """Whether this plan expects NCCL to go over RDMA to other nodes."""
    return plan.workers.backend == "nccl" and plan.nodes.count > 1 and plan.network.transport != "sockets"


def read_traffic(plan: Plan, root: Path = Path("/")) -> Traffic:
    """Counters of all RDMA ports, which count in 4 bytes (kernel: Documentation/ABI/stable/sysfs-class-infiniband), and
    of the interface that NCCL's sockets would use. RDMA does not count in the interface's."""
    devices = root / "sys/class/infiniband"
    folders = [devices / device / "ports" for device in entries(devices)]
    ports = [folder / port for folder in folders for port in entries(folder)]
    words = [number(port / "counters/port_xmit_data") for port in ports]
    counted = [each for each in words if each is not None]
    return Traffic(
        rdma=4 * sum(counted) if counted and len(counted) == len(words) else None,
        interface=number(root / "sys/class/net" / plan.network.interface / "statistics/tx_bytes") or 0,
    )


def count_bytes(interface: str, root: Path = Path("/")) -> dict[str, tuple[int, int]]:
    """(received, sent) since the machine started, of the job's interface and of each RDMA port that counts."""
    statistics = root / "sys/class/net" / interface / "statistics"
    found = {interface: (number(statistics / "rx_bytes"), number(statistics / "tx_bytes"))}
    devices = root / "sys/class/infiniband"
    for device in entries(devices):
        for port in entries(devices / device / "ports"):
            words = [number(devices / device / "ports" / port / f"counters/port_{way}_data") for way in ("rcv", "xmit")]
            found[f"{device}:{port}"] = (words[0] and 4 * words[0], words[1] and 4 * words[1])
    return {name: (got, sent) for name, (got, sent) in found.items() if got is not None and sent is not None}


def alarm(plan: Plan, before: Traffic, now: Traffic) -> str | None:
    """What to say of the way that the bytes took; "" if it is the planned one or nobody counts, None while too few were
    sent."""
    if before.rdma is None or now.rdma is None:
        return ""
    rdma, interface = now.rdma - before.rdma, now.interface - before.interface
    if rdma + interface < ENOUGH:
        return None
    if rdma >= interface:
        return ""
    return (
        f"warning: {plan.network.transport} is here, but NCCL runs over sockets: {plan.network.interface} has sent "
        f"{interface / 1e9:.1f} GB, all RDMA ports {rdma / 1e9:.1f} GB. It is many times slower. NCCL_DEBUG=INFO tells "
        "why (NET/Socket instead of NET/IB); `doctor` on all nodes finds the usual causes"
    )


async def watch(plan: Plan, say: Callable[[str], None], root: Path = Path("/")) -> None:
    """Checks until enough bytes went out, for an hour at most, and says so if they took the wrong way. Raises OSError
    where the counters do not answer."""
    before = await off_loop(lambda: read_traffic(plan, root), READ)
    if before.rdma is None:
        return
    for _ in range(CHECKS):
        await asyncio.sleep(CHECK_EVERY)
        told = alarm(plan, before, await off_loop(lambda: read_traffic(plan, root), READ))
        if told is not None:
            if told:
                say(told)
            return
