"""GPUs: the only place that knows a vendor. Each has its file and its line in VENDORS."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from app.host.accelerators import amd, nvidia
from app.host.accelerators.gpu import GpuFault, GpuLoad, Gpus, GpuState, Vendor
from app.host.accelerators.kernel_log import kernel_log
from app.host.files import text

VENDORS: Mapping[str, Vendor] = {vendor.name: vendor for vendor in (nvidia.VENDOR, amd.VENDOR)}
ACS, ACS_REDIRECT = 0x000D, 0b1100
"""PCI Express: the extended capability Access Control Services, and in its control register the bits that send requests
and completions between devices up to the root instead (lspci shows ReqRedir+ and CmpltRedir+)."""


def vendor_of(gpus: Gpus) -> Vendor:
    return VENDORS[gpus.vendor]


def vendor_for(hardware: str) -> Vendor:
    """The vendor whose GPUs this word of HARDWARE asks for: the first vendor's for words that are nobody's own."""
    return next((vendor for vendor in VENDORS.values() if hardware == vendor.hardware), nvidia.VENDOR)


def read_gpus(root: Path) -> Gpus:
    """Those that this process may use; where there is none, those that are only on the PCI bus."""
    found = [vendor.read(root) for vendor in VENDORS.values()]
    return next((gpus for gpus in found if gpus.visible), next((gpus for gpus in found if gpus.on_bus), found[0]))


def read_state(root: Path, gpus: Gpus) -> GpuState:
    """Their state. Never raises."""
    if not gpus.visible:
        return GpuState()
    vendor = vendor_of(gpus)
    bridges = {bridge for gpu in gpus.visible for bridge in gpu.pci[:-1]}
    return replace(
        vendor.state(root, gpus),
        iommu=_iommu(root, [gpu.bus for gpu in gpus.visible if gpu.bus]),
        redirecting=tuple(sorted(bridge for bridge in bridges if _redirects(root, bridge))),
        faults=vendor.faults(kernel_log(root / "dev/kmsg"), 0.0),
    )


def read_loads(root: Path = Path("/")) -> tuple[GpuLoad, ...]:
    """What the GPUs of this process do at this moment. Never raises."""
    gpus = read_gpus(root)
    return vendor_of(gpus).loads(root, gpus) if gpus.visible else ()


def used_memory(environ: Mapping[str, str], root: Path = Path("/")) -> Mapping[int, int]:
    """MiB in use of each GPU that a process of this environment sees, by index; all where the mask has no numbers.
    Never raises."""
    gpus = read_gpus(root)
    if not gpus.visible:
        return {}
    vendor = vendor_of(gpus)
    mask = next((environ[name] for name in vendor.masks if environ.get(name)), "")
    chosen = {int(entry) for entry in mask.split(",") if entry.strip().isdecimal()}
    return {index: used for index, used in vendor.memory(root, gpus).items() if not chosen or index in chosen}


def recent_faults(since: float) -> tuple[GpuFault, ...]:
    """What the drivers have logged since a time in seconds after the start of the machine."""
    log = kernel_log()
    return tuple(fault for vendor in VENDORS.values() for fault in vendor.faults(log, since))


def _iommu(root: Path, buses: Sequence[str]) -> dict[str, str]:
    found = {}
    for bus in buses:
        kind = text(root / "sys/bus/pci/devices" / bus.lower() / "iommu_group" / "type")
        if kind:
            found[bus] = kind
    return found


def _redirects(root: Path, bridge: str) -> bool:
    config = b""
    with contextlib.suppress(OSError):
        config = (root / "sys/bus/pci/devices" / bridge / "config").read_bytes()
    offset = 0x100
    for _ in range(48):
        header = int.from_bytes(config[offset : offset + 4], "little")
        if header & 0xFFFF == ACS:
            return bool(int.from_bytes(config[offset + 6 : offset + 8], "little") & ACS_REDIRECT)
        offset = header >> 20
        if offset < 0x100:
            break
    return False
