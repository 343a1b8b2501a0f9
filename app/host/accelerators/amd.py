"""AMD GPUs, from the kernel's own files: KFD's topology names them, /dev/dri/renderD* says which were given.

Made from the kernel's documentation and public listings; no AMD GPU has run any of this.
"""

import os
import re
from pathlib import Path

from app.host.accelerators.gpu import Gpu, GpuFault, GpuHealth, GpuLoad, Gpus, GpuState, Vendor
from app.host.accelerators.kernel_log import lines_since
from app.host.files import entries, number, pci_path, text

COMPUTE_CLASSES = (0x0380, 0x1200)
"""PCI classes of AMD's Instinct cards. 0x0300 is left out: the graphics inside a processor have it too, and nobody
would train there without asking for it."""


def read_gpus(root: Path) -> Gpus:
    visible = _visible(root)
    base = root / "sys/bus/pci/devices"
    on_bus = tuple(
        bus
        for bus in entries(base)
        if number(base / bus / "vendor") == 0x1002 and (number(base / bus / "class") or 0) >> 8 in COMPUTE_CLASSES
    )
    return Gpus(
        vendor="AMD",
        visible=visible,
        on_bus=on_bus,
        driver=text(root / "sys/module/amdgpu/version") or "",
        runtime=(text(root / "opt/rocm/.info/version") or "").partition("-")[0],
        # The driver exports GPU memory as dma-buf, which RCCL registers with the cards.
        direct="dma-buf" if visible else "",
    )


def _visible(root: Path) -> tuple[Gpu, ...]:
    if not os.access(root / "dev/kfd", os.R_OK | os.W_OK):
        return ()
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    found = list[Gpu]()
    for node in entries(nodes):
        fields = dict(line.split(maxsplit=1) for line in (text(nodes / node / "properties") or "").splitlines())
        properties = {name: int(value) for name, value in fields.items() if value.isdigit()}
        render = f"renderD{properties.get('drm_render_minor', 0)}"
        # A node with CPUs is a processor, also one with graphics inside; MI300A is left out with them.
        is_gpu = properties.get("simd_count", 0) > 0 and not properties.get("cpu_cores_count", 0)
        if is_gpu and os.access(root / "dev/dri" / render, os.R_OK | os.W_OK):
            bus = _bus(properties.get("domain", 0), properties.get("location_id", 0))
            name = text(root / "sys/class/drm" / render / "device/product_name") or "AMD GPU"
            pci = pci_path(root / "sys/bus/pci/devices" / bus)
            found.append(Gpu(index=len(found), name=name, bus=bus, pci=pci, render=render))
    return tuple(found)


def _bus(domain: int, location: int) -> str:
    # location_id is bus, device and function as PCI packs them (kernel: amdkfd/kfd_topology.c).
    return f"{domain:04x}:{location >> 8:02x}:{location >> 3 & 0x1F:02x}.{location & 7:x}"


def state(root: Path, gpus: Gpus) -> GpuState:
    """Memory and ECC from sysfs (kernel: Documentation/gpu/amdgpu); the kernel does not tell whether clocks are held
    down, nor which GPUs reach each other."""
    health = []
    for gpu in gpus.visible:
        folder = root / "sys/class/drm" / gpu.render / "device"
        errors = re.search(r"^ue:\s*(\d+)", text(folder / "ras/umc_err_count") or "", re.MULTILINE)
        health.append(
            GpuHealth(
                index=gpu.index,
                used=(number(folder / "mem_info_vram_used") or 0) >> 20,
                total=(number(folder / "mem_info_vram_total") or 0) >> 20,
                uncorrected=int(errors[1]) if errors else 0,
            )
        )
    return GpuState(health=tuple(health))


def loads(root: Path, gpus: Gpus) -> tuple[GpuLoad, ...]:
    found = []
    for gpu in gpus.visible:
        folder = root / "sys/class/drm" / gpu.render / "device"
        busy, heat = number(folder / "gpu_busy_percent"), None
        for sensor in entries(folder / "hwmon"):
            heat = number(folder / "hwmon" / sensor / "temp1_input")
        found.append(
            GpuLoad(
                index=gpu.index,
                busy=None if busy is None else busy / 100,
                used=number(folder / "mem_info_vram_used"),
                total=number(folder / "mem_info_vram_total"),
                temperature=None if heat is None else heat // 1000,
            )
        )
    return tuple(found)


def memory(root: Path, gpus: Gpus) -> dict[int, int]:
    return {each.index: each.used for each in state(root, gpus).health}


def read_resets(log: str, since: float) -> tuple[GpuFault, ...]:
    """`amdgpu 0000:c1:00.0: amdgpu: GPU reset begin!`, and those that failed."""
    found = []
    for line in lines_since(log, since):
        reset = re.search(r"amdgpu ([0-9a-f:.]+): amdgpu: GPU reset (begin|.*failed)", line)
        if reset:
            failed = reset[2] != "begin"
            found.append(GpuFault(bus=reset[1], name="GPU reset failed" if failed else "GPU reset", dead=failed))
    return tuple(dict.fromkeys(found))


VENDOR = Vendor(
    name="AMD",
    runtime="ROCm",
    unfit_torch=r"^[0-9.]+$|\+(cpu|cu)",
    device_node="/dev/kfd",
    hardware="rocm",
    hardware_rdma="rocm",
    driver="the amdgpu driver and set RENDER_GROUP to what `stat -c %g /dev/kfd` prints",
    masks=("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    no_direct="no amdgpu that exports dma-buf",
    fix_direct="",
    fixes={
        "gpu-state-unknown": "amd-smi list",
        "gpu-memory-used": "amd-smi process",
        "gpu-ecc": "amd-smi metric --gpu {gpu} --ecc   # then amd-smi reset --gpureset --gpu {gpu}, or replace it",
        "gpu-dead": "dmesg -T | grep amdgpu   # when; then restart the machine; if it comes again, replace the GPU",
        "gpu-fault": "dmesg -T | grep amdgpu   # when, and for which process",
        "nccl-no-gpudirect": "check PCI ACS and IOMMU, and `amd-smi topology`",
    },
    read=read_gpus,
    state=state,
    loads=loads,
    memory=memory,
    faults=read_resets,
)
