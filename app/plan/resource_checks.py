"""What this plan needs of the machine, against what there is: interface, locked memory, shared memory, files, CPUs."""

from app.config.problems import count
from app.host import Host
from app.host.accelerators import vendor_of
from app.host.nics import Nic
from app.plan.decisions import Ledger
from app.plan.local import Own
from app.plan.parts import LocalWorkers
from app.plan.rdma_access import memlock_obstacle

SHM_PER_GPU = 1 << 30
"""Bytes of /dev/shm per process: NCCL's buffers between the GPUs of a machine, and batches of data loaders."""
SHM_OF_LOADERS = 64 << 20
"""Bytes of /dev/shm that batches alone need: Gloo takes none."""
OPEN_FILES = 4096
MEMORY_PER_PROCESS = 1 << 30


def check_needs(host: Host, workers: LocalWorkers, transport: str, ledger: Ledger) -> None:
    """Limits as facts in the plan, and warnings or problems where they are too low for it."""
    ledger.decide("limits", "limits", count(host.limits.cpus, "CPU"), "detected", describe_limits(host))
    rdma = workers.backend == "nccl" and transport != "sockets"
    if rdma and (blocked := memlock_obstacle(host, transport)):
        ledger.problems.append(blocked)
    _check_shm(host, workers, ledger)
    _check_files(host, ledger)
    _check_memory(host, workers, ledger)
    if workers.nproc > host.limits.cpus and workers.backend == "gloo":
        ledger.warn("limits.cpus", setting="NPROC_PER_NODE", nproc=workers.nproc, cpus=host.limits.cpus)
    if rdma:
        _report_direct(host, transport, ledger)


def _check_shm(host: Host, workers: LocalWorkers, ledger: Ledger) -> None:
    nccl = workers.backend == "nccl"
    wanted = SHM_PER_GPU * workers.nproc if nccl else SHM_OF_LOADERS
    if host.limits.shm is not None and host.limits.shm < wanted:
        ledger.warn(
            "limits.shm",
            setting="SHM_SIZE",
            nccl=nccl,
            size=_size(host.limits.shm),
            wanted=_size(wanted),
            nproc=workers.nproc,
        )


def _check_files(host: Host, ledger: Ledger) -> None:
    # The launcher raises the soft limit to the hard one by itself.
    if host.limits.open_files is not None and host.limits.open_files < OPEN_FILES:
        ledger.warn("limits.open-files", limit=host.limits.open_files)


def _check_memory(host: Host, workers: LocalWorkers, ledger: Ledger) -> None:
    if host.limits.memory is not None and host.limits.memory < MEMORY_PER_PROCESS * workers.nproc:
        ledger.warn(
            "limits.memory",
            setting="NPROC_PER_NODE",
            limit=_size(host.limits.memory),
            nproc=workers.nproc,
            each=_size(MEMORY_PER_PROCESS),
        )


def _report_direct(host: Host, transport: str, ledger: Ledger) -> None:
    gpus, vendor = host.gpus, vendor_of(host.gpus)
    if gpus.unified:
        why = "GPU and CPU share one memory here, there is nothing to bypass"
        ledger.decide("rdma", "GPUDirect RDMA", "no", "detected", why)
    elif gpus.direct:
        ledger.decide("rdma", "GPUDirect RDMA", gpus.direct, "detected", "cards can read GPU memory by themselves")
    else:
        ledger.decide("rdma", "GPUDirect RDMA", "no", "detected", f"{vendor.no_direct} loaded")
        missing, remedy = vendor.no_direct, vendor.fix_direct
        ledger.warn("rdma.no-gpu-direct", transport=transport, missing=missing, remedy=remedy)


def check_interface(host: Host, own: Own, ledger: Ledger) -> None:
    """Warnings about the interface that carries this node's address."""
    nic = next((each for each in host.nics if each.name == own.interface), None)
    if nic is None or nic.kind == "loopback":
        return
    if not nic.up:
        ledger.warn("network.link-down", "severe", nic=nic.name, address=own.address, state=nic.operstate)
    _warn_first_address(nic, own, ledger)
    _warn_slow(nic, host, own, ledger)
    _warn_mtu(nic, host, ledger)
    _warn_arp(nic, host, own, ledger)
    if nic.kind == "tunnel":
        ledger.warn("network.tunnel", nic=nic.name)


def _warn_first_address(nic: Nic, own: Own, ledger: Ledger) -> None:
    # NCCL and Gloo take an interface, and of it the first address, IPv4 before IPv6.
    used = next((each.text for each in nic.addresses if ":" not in each.text), own.address)
    if used != own.address and any(each.text == own.address for each in nic.addresses):
        # NCCL is told the family where nodes are listed by IPv6.
        ipv6 = ":" in own.address
        ledger.warn("network.several-addresses", nic=nic.name, address=own.address, used=used, ipv6=ipv6)


def speed_of(nic: Nic, host: Host, depth: int = 3) -> int | None:
    """Mb/s of an interface, through VLANs and bonds to the cards below: at most `depth` levels."""
    if nic.speed is not None or depth == 0:
        return nic.speed
    below = [speed_of(each, host, depth - 1) or 0 for each in host.nics if each.name in nic.lower]
    return sum(below) or None


def _warn_slow(nic: Nic, host: Host, own: Own, ledger: Ledger) -> None:
    mine = speed_of(nic, host)
    devices = {name for port in host.rdma_ports if port.state == "ACTIVE" for name in port.netdevs}
    for other in host.nics:
        theirs = speed_of(other, host)
        if mine and theirs and other.name in devices and other.addresses and theirs >= 10 * mine:
            ledger.warn(
                "network.slow",
                nic=nic.name,
                speed=mine / 1000,
                address=own.address,
                other=other.name,
                faster=theirs / 1000,
                unused=other.addresses[0].text,
            )
            return


def _warn_mtu(nic: Nic, host: Host, ledger: Ledger) -> None:
    for other in host.nics:
        twins = other.name in nic.lower or (
            other.name != nic.name and other.pci and other.pci[:-1] == nic.pci[:-1] and _slot(other) == _slot(nic)
        )
        smaller = other.name in nic.lower and other.mtu is not None and nic.mtu is not None and other.mtu < nic.mtu
        unlike = other.name not in nic.lower and other.mtu != nic.mtu and other.addresses
        if twins and (smaller or unlike):
            ledger.warn("network.twin-mtu", nic=nic.name, mtu=nic.mtu, twin=other.name, other=other.mtu)


def _warn_arp(nic: Nic, host: Host, own: Own, ledger: Ledger) -> None:
    mine = next((each.network for each in nic.addresses if each.text == own.address), None)
    for other in host.nics:
        shared = other.name != nic.name and other.kind != "container" and other.up and not other.arp_ignore
        if mine is not None and mine.version == 4 and shared and any(each.network == mine for each in other.addresses):
            ledger.warn("network.arp", nic=nic.name, other=other.name, network=mine)
            return


def _slot(nic: Nic) -> str:
    return nic.pci[-1].rpartition(".")[0] if nic.pci else ""


def describe_limits(host: Host) -> str:
    limits = host.limits
    parts = [
        f"memory {_size(limits.memory)}",
        f"locked memory {_size(limits.memlock)}",
        f"shared memory {_size(limits.shm) if limits.shm is not None else 'none'}",
        f"{limits.open_files if limits.open_files is not None else 'unlimited'} open files",
    ]
    return ", ".join(parts)


def _size(count: int | None) -> str:
    if count is None:
        return "unlimited"
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.4g} {unit}"
    return f"{count} bytes"
