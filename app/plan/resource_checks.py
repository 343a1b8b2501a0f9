"""What this plan needs of the machine, against what there is: interface, locked memory, shared memory, files, CPUs."""

from app.host import Host
from app.host.nics import Nic
from app.plan.decisions import Ledger, count
from app.plan.local import Own
from app.plan.parts import Workers
from app.plan.rdma_access import direct, memlock_obstacle

SHM_PER_GPU = 1 << 30
"""Bytes of /dev/shm per process: NCCL's buffers between the GPUs of a machine, and batches of data loaders."""
SHM_OF_LOADERS = 64 << 20
"""Bytes of /dev/shm that batches alone need: Gloo takes none."""
OPEN_FILES = 4096
MEMORY_PER_PROCESS = 1 << 30


def check_needs(host: Host, workers: Workers, transport: str, ledger: Ledger) -> None:
    """Limits as facts in the plan, and warnings or problems where they are too low for it."""
    limits, processes = host.limits, count(workers.nproc, "process", "processes")
    ledger.decide("limits", count(limits.cpus, "CPU"), "detected", _summary(host))
    blocked = memlock_obstacle(host)
    if blocked and workers.backend == "nccl" and transport != "sockets":
        ledger.refuse("memlock", f"{transport} is chosen, but {blocked}. (NCCL_IB_DISABLE=1 would use sockets.)")
    wanted, who = SHM_OF_LOADERS, f"the data loaders of {processes} want"
    if workers.backend == "nccl":
        wanted, who = SHM_PER_GPU * workers.nproc, f"{processes} with NCCL want{'s' * (workers.nproc == 1)}"
    if limits.shm is not None and limits.shm < wanted:
        ledger.warn(
            f"Shared memory (/dev/shm) has {_size(limits.shm)}, and {who} about {_size(wanted)}. Set SHM_SIZE in .env; "
            "otherwise it may end with 'No space left on device'."
        )
    # The launcher raises the soft limit to the hard one by itself.
    if limits.open_files is not None and limits.open_files < OPEN_FILES:
        ledger.warn(
            f"Only {limits.open_files} files and connections may be open at once (the hard limit); large jobs need "
            "more. Raise it: `ulimit -Hn 65536` as root, or `ulimits: nofile` in compose."
        )
    if limits.memory is not None and limits.memory < MEMORY_PER_PROCESS * workers.nproc:
        ledger.warn(
            f"The memory limit is {_size(limits.memory)} for {processes} of torch, which take about "
            f"{_size(MEMORY_PER_PROCESS)} each before they load anything. Raise it or lower NPROC_PER_NODE."
        )
    if workers.nproc > limits.cpus and workers.backend == "gloo":
        ledger.warn(f"{workers.nproc} processes share {count(limits.cpus, 'CPU')}: they will slow each other down.")
    if workers.backend == "nccl" and transport != "sockets":
        _report_direct(host, transport, ledger)


def _report_direct(host: Host, transport: str, ledger: Ledger) -> None:
    way = direct(host)
    if way:
        ledger.decide("GPUDirect RDMA", way, "detected", "cards can read GPU memory by themselves")
    else:
        ledger.decide("GPUDirect RDMA", "no", "detected", "neither nvidia_peermem nor NVIDIA's open kernel modules")
        ledger.warn(
            f"{transport} will go through the CPU's memory: the kernel module nvidia_peermem is not loaded. "
            "Run `modprobe nvidia-peermem` on this machine."
        )


def check_interface(host: Host, own: Own, ledger: Ledger) -> None:
    """Warnings about the interface that carries this node's address."""
    nic = next((each for each in host.nics if each.name == own.interface), None)
    if nic is None or nic.kind == "loopback":
        return
    if not nic.up:
        ledger.warn(f"{nic.name} carries {own.address}, but its link is {nic.operstate}: check its cable and switch.")
    _warn_first_address(nic, own, ledger)
    _warn_slow(nic, host, own, ledger)
    _warn_mtu(nic, host, ledger)
    _warn_arp(nic, host, own, ledger)
    if nic.kind == "tunnel":
        ledger.warn(f"{nic.name} is a tunnel (VPN): expect a fraction of the network's speed.")


def _warn_first_address(nic: Nic, own: Own, ledger: Ledger) -> None:
    # NCCL and Gloo take an interface, and of it the first address, IPv4 before IPv6.
    used = next((each.text for each in nic.addresses if ":" not in each.text), own.address)
    if used != own.address and any(each.text == own.address for each in nic.addresses):
        # NCCL is told the family where nodes are listed by IPv6.
        they = "Gloo uses" if ":" in own.address else "NCCL and Gloo use"
        ledger.warn(
            f"{nic.name} has several addresses. torchrun uses {own.address}, but {they} the first, {used}: "
            "it must be reachable from the other nodes too. List the first ones in NODES if it is not."
        )


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
                f"{nic.name} ({mine / 1000:g} Gb/s) carries {own.address}, but {other.name} ({theirs / 1000:g} Gb/s, "
                f"with RDMA) has {other.addresses[0].text}: list the addresses of that network in NODES if all nodes "
                "are on it."
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
            ledger.warn(
                f"{nic.name} has MTU {nic.mtu}, its twin {other.name} has {other.mtu}: packets of the larger size are "
                "lost where the smaller one is in the way. Give both, on all nodes, the same MTU."
            )


def _warn_arp(nic: Nic, host: Host, own: Own, ledger: Ledger) -> None:
    mine = next((each.network for each in nic.addresses if each.text == own.address), None)
    for other in host.nics:
        shared = other.name != nic.name and other.kind != "container" and other.up and not other.arp_ignore
        if mine is not None and mine.version == 4 and shared and any(each.network == mine for each in other.addresses):
            ledger.warn(
                f"{nic.name} and {other.name} are both in {mine}, and each answers for the other's address, so traffic "
                "may take the wrong card. `sysctl -w net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2` "
                "on this machine ends that."
            )
            return


def _slot(nic: Nic) -> str:
    return nic.pci[-1].rpartition(".")[0] if nic.pci else ""


def _summary(host: Host) -> str:
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
