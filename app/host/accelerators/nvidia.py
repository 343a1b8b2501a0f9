"""NVIDIA GPUs: those that this process may use, and those that are only on the PCI bus."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.host.files import entries, number, pci_path, text

if TYPE_CHECKING:
    import ctypes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    index: int
    name: str = "NVIDIA GPU"
    bus: str = ""
    """PCI address, 0000:18:00.0."""
    pci: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    visible: tuple[Gpu, ...] = ()
    """Those with a device node here, which is what a container has been given."""
    on_bus: tuple[str, ...] = ()
    """PCI addresses of all of NVIDIA's GPUs in the machine, given or not."""
    driver: str = ""
    cuda: str = ""
    """Highest CUDA version that the driver supports."""


def read_gpus(root: Path) -> Gpus:
    """The kernel's own files answer without starting anything; NVML adds the CUDA version where it is installed."""
    visible = _visible(root)
    driver = re.search(r"\s([0-9]+\.[0-9]+(?:\.[0-9]+)?)\s", text(root / "proc/driver/nvidia/version") or "")
    cuda, count = "", 0
    if root == Path("/") and (visible or (root / "dev/dxg").exists()):
        cuda, count = nvml_facts(_load_nvml())
    if not visible:
        # Under WSL there are no device nodes per GPU, only NVML knows them.
        visible = tuple(Gpu(index=index) for index in range(count))
    return Gpus(visible=visible, on_bus=_on_bus(root), driver=driver[1] if driver else "", cuda=cuda)


def _visible(root: Path) -> tuple[Gpu, ...]:
    minors = [int(name.removeprefix("nvidia")) for name in entries(root / "dev") if re.fullmatch(r"nvidia[0-9]+", name)]
    known = {}
    for bus in entries(root / "proc/driver/nvidia/gpus"):
        information = text(root / "proc/driver/nvidia/gpus" / bus / "information") or ""
        fields = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", information, re.MULTILINE))
        if fields.get("Device Minor", "").isdigit():
            known[int(fields["Device Minor"])] = (fields.get("Model", "NVIDIA GPU"), bus)
    gpus = []
    for index, minor in enumerate(minors):
        name, bus = known.get(minor, ("NVIDIA GPU", ""))
        pci = pci_path(root / "sys/bus/pci/devices" / bus) if bus else ()
        gpus.append(Gpu(index=index, name=name, bus=bus, pci=pci))
    return tuple(gpus)


def _on_bus(root: Path) -> tuple[str, ...]:
    base = root / "sys/bus/pci/devices"
    return tuple(
        bus
        for bus in entries(base)
        if number(base / bus / "vendor") == 0x10DE and (number(base / bus / "class") or 0) >> 8 in (0x0300, 0x0302)
    )


def _load_nvml() -> "ctypes.CDLL | None":
    # Few machines need it, and loading ctypes costs as much as the rest of this module.
    import ctypes

    try:
        return ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None


def nvml_facts(library: "ctypes.CDLL | None") -> tuple[str, int]:
    """(CUDA version, number of GPUs) from a loaded libnvidia-ml; ("", 0) where it is absent or refuses.

    Source: NVML API reference, nvmlSystemGetCudaDriverVersion_v2 (1000 * major + 10 * minor), nvmlDeviceGetCount_v2.
    """
    import ctypes

    if library is None or library.nvmlInit_v2() != 0:
        return "", 0
    version, count = ctypes.c_int(0), ctypes.c_uint(0)
    library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version))
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    library.nvmlShutdown()
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else ""
    return cuda, count.value
