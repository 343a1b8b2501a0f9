"""NVIDIA GPUs: those that this process may use, and those that are only on the PCI bus."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from app.host.accelerators.gpu import Gpu, Gpus, Vendor
from app.host.accelerators.nvidia_health import loads, read_xids, state
from app.host.files import entries, number, pci_path, text

if TYPE_CHECKING:
    import ctypes

UNIFIED = re.compile(r"\bGB10\b")
"""DGX Spark: nvidia-peermem, dma-buf and GDRCopy do not work there (NVIDIA: DGX Spark user guide, known issues)."""


def read_gpus(root: Path) -> Gpus:
    """The kernel's own files answer without starting anything; NVML adds the CUDA version where it is installed."""
    visible = _visible(root)
    version = text(root / "proc/driver/nvidia/version") or ""
    driver = re.search(r"\s([0-9]+\.[0-9]+(?:\.[0-9]+)?)\s", version)
    cuda, count = "", 0
    if root == Path("/") and (visible or (root / "dev/dxg").exists()):
        cuda, count = nvml_facts(_load_nvml())
    if not visible:
        # Under WSL there are no device nodes per GPU, only NVML knows them.
        visible = tuple(Gpu(index=index, name="NVIDIA GPU") for index in range(count))
    unified = bool(visible) and all(UNIFIED.search(gpu.name) for gpu in visible)
    return Gpus(
        visible=visible,
        on_bus=_on_bus(root),
        driver=driver[1] if driver else "",
        runtime=cuda,
        direct="" if unified else _direct(root, version),
        unified=unified,
    )


def _direct(root: Path, version: str) -> str:
    if (root / "sys/module/nvidia_peermem").exists():
        return "nvidia_peermem"
    return "dma-buf" if "Open Kernel Module" in version else ""


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
    # Few machines need it, and loading ctypes costs as much as the rest of this module; pynvml costs more.
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


def nvml_memory(library: "ctypes.CDLL | None") -> dict[int, int]:
    """MiB in use by index from a loaded libnvidia-ml; {} where it is absent or refuses.

    Source: NVML API reference, nvmlMemory_t (total, free and used bytes, unsigned long long each)."""
    import ctypes

    if library is None or library.nvmlInit_v2() != 0:
        return {}
    count, found = ctypes.c_uint(0), dict[int, int]()
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()
        refused = library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        if not refused and not library.nvmlDeviceGetMemoryInfo(handle, memory):
            found[index] = memory[2] >> 20
    library.nvmlShutdown()
    return found


VENDOR = Vendor(
    name="NVIDIA",
    runtime="CUDA",
    unfit_torch=r"\+(cpu|rocm)",
    device_node="/dev/nvidia0",
    hardware="nvidia",
    hardware_rdma="nvidia-ib",
    driver="the NVIDIA driver and the container toolkit",
    masks=("CUDA_VISIBLE_DEVICES",),
    no_direct="neither nvidia_peermem nor one of NVIDIA's open kernel modules",
    fix_direct="Run `sudo modprobe nvidia-peermem` on this machine",
    fixes={
        "gpu-state-unknown": "nvidia-smi",
        "gpu-memory-used": "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv",
        "gpu-ecc": "nvidia-smi -i {gpu} -q -d ECC,ROW_REMAPPER   # then `nvidia-smi -r`, or replace it",
        "gpu-slowed": "nvidia-smi -i {gpu} -q -d PERFORMANCE,TEMPERATURE,POWER",
        "gpu-no-p2p": "nvidia-smi topo -p2p r; nvidia-smi topo -m   # normal for GeForce cards; else a BIOS or driver "
        "setting",
        "gpu-dead": "dmesg -T | grep Xid   # when; then sudo nvidia-smi -r, or restart the machine; if it comes again, "
        "have the GPU replaced",
        "gpu-fault": "dmesg -T | grep Xid   # when; then look the number up in NVIDIA's Xid table: many are a fault of "
        "the program that ran",
        "nccl-no-gpudirect": "sudo modprobe nvidia-peermem; check PCI ACS and IOMMU, and `nvidia-smi topo -m`",
    },
    read=read_gpus,
    state=state,
    loads=loads,
    memory=lambda root, _gpus: nvml_memory(_load_nvml()) if root == Path("/") else {},
    faults=read_xids,
)
