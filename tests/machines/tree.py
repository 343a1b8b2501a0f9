"""Made-up machines: /sys, /proc and /dev as files below a folder, with the values that real ones have.

These are fakes of hardware that no test machine has; nothing here ran on a GPU or on InfiniBand.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path

GIB = 1 << 30
OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (dvs-builder@U22)  Wed Aug 27"
)
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max locked memory         {memlock:<20} {memlock:<20} bytes
Max open files            {files:<20} 1048576              files
"""


@dataclass(slots=True)
class Tree:
    """One machine while it is being built."""

    root: Path
    links: list[dict[str, object]] = field(default_factory=list)
    """What `ip -j addr` would print."""

    def write(self, path: str, content: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n", encoding="utf-8")

    def link(self, path: str, target: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(os.path.relpath(self.root / target, file.parent))


def basics(
    tree: Tree,
    *,
    hostname: str,
    cpus: int,
    container: bool = True,
    memlock: str = "unlimited",
    files: int = 1048576,
    shm: int = 8 * GIB,
    torch: str = "2.13.0+cpu",
) -> None:
    """What every machine has: a name, CPUs, limits, the port range, an installed torch."""
    tree.write("proc/sys/kernel/hostname", hostname)
    tree.write("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999")
    tree.write("proc/self/status", f"Name:\tpython\nCapEff:\t0000000000000000\nCpus_allowed_list:\t0-{cpus - 1}")
    tree.write("proc/self/limits", LIMITS.format(memlock=memlock, files=files))
    tree.write("proc/self/cgroup", "0::/")
    tree.write("sys/fs/cgroup/cpu.max", "max 100000")
    tree.write("sys/fs/cgroup/memory.max", "max")
    tree.write("shm-bytes", str(shm))
    if container:
        tree.write(".dockerenv", "")
    packages = "opt/venv/lib/python3.12/site-packages"
    (tree.root / packages / f"torch-{torch}.dist-info").mkdir(parents=True)
    if "+cpu" not in torch:
        (tree.root / packages / "nvidia_nccl_cu13-2.29.7.dist-info").mkdir()
    nic(tree, "lo", ("127.0.0.1/8", "::1/128"), kind=772, operstate="unknown", mtu=65536)


def nic(
    tree: Tree,
    name: str,
    addresses: Sequence[str] = (),
    *,
    pci: str = "",
    kind: int = 1,
    operstate: str = "up",
    speed: int | None = None,
    mtu: int = 1500,
    devtype: str = "",
    lower: Sequence[str] = (),
    port: int = 0,
) -> None:
    """An interface; `pci` is the folder of its function, empty for what has no card."""
    folder = f"sys/devices/{pci}/net/{name}" if pci else f"sys/devices/virtual/net/{name}"
    tree.write(f"{folder}/operstate", operstate)
    tree.write(f"{folder}/type", str(kind))
    tree.write(f"{folder}/mtu", str(mtu))
    tree.write(f"{folder}/dev_port", str(port))
    tree.write(f"{folder}/uevent", f"INTERFACE={name}" + (f"\nDEVTYPE={devtype}" if devtype else ""))
    if speed is not None:
        tree.write(f"{folder}/speed", str(speed))
    if pci:
        tree.link(f"{folder}/device", f"sys/devices/{pci}")
        tree.write(f"sys/devices/{pci}/class", "0x020000")
    for each in lower:
        tree.link(f"{folder}/lower_{each}", f"sys/class/net/{each}")
    if devtype == "bond":
        tree.write(f"{folder}/bonding/slaves", " ".join(lower))
        tree.write(f"{folder}/bonding/mode", "802.3ad 4")
    tree.link(f"sys/class/net/{name}", folder)
    local = [ip_interface(each) for each in addresses]
    infos = [{"local": str(each.ip), "prefixlen": each.network.prefixlen} for each in local]
    tree.links.append({"ifname": name, "addr_info": infos})


def hca(
    tree: Tree,
    device: str,
    pci: str,
    *,
    layer: str = "InfiniBand",
    state: str = "4: ACTIVE",
    rate: str = "400 Gb/sec (4X NDR)",
    lid: int = 0,
    sm_lid: int = 0,
    gids: Sequence[tuple[str, str, str]] = (),
    number: int = 0,
    node: bool = True,
    vpd: str = "",
    vendor: int = 0x15B3,
) -> None:
    """An RDMA device with one port. `gids` are (GID, type, netdev); on InfiniBand type and netdev are unreadable.

    `node` tells whether /dev/infiniband/uverbsN is there.
    """
    folder = f"sys/devices/{pci}/infiniband/{device}"
    port = f"{folder}/ports/1"
    tree.write(f"{port}/state", state)
    tree.write(f"{port}/phys_state", "5: LinkUp" if state != "1: DOWN" else "3: Disabled")
    tree.write(f"{port}/link_layer", layer)
    tree.write(f"{port}/rate", rate)
    tree.write(f"{port}/lid", hex(lid))
    tree.write(f"{port}/sm_lid", hex(sm_lid))
    for index in range(8):
        gid, kind, netdev = gids[index] if index < len(gids) else (":".join(["0000"] * 8), "", "")
        tree.write(f"{port}/gids/{index}", gid)
        # The kernel answers EINVAL to the types of slots that are empty; a folder cannot be read either.
        for leaf, content in (("types", kind), ("ndevs", netdev)):
            if content:
                tree.write(f"{port}/gid_attrs/{leaf}/{index}", content)
            else:
                (tree.root / f"{port}/gid_attrs/{leaf}/{index}").mkdir(parents=True)
    tree.link(f"{folder}/device", f"sys/devices/{pci}")
    tree.link(f"sys/class/infiniband/{device}", folder)
    tree.write(f"sys/class/infiniband_verbs/uverbs{number}/ibdev", device)
    tree.write(f"sys/devices/{pci}/vendor", hex(vendor))
    if vpd:
        tree.write(f"sys/devices/{pci}/vpd", vpd)
    if node:
        tree.write(f"dev/infiniband/uverbs{number}", "")


def rdma_software(tree: Tree, *, peermem: bool = True) -> None:
    """The libraries in the image and the kernel module beside the GPU driver."""
    tree.write("usr/lib/x86_64-linux-gnu/libibverbs.so.1", "")
    tree.write("usr/lib/x86_64-linux-gnu/libibverbs/libmlx5-rdmav34.so", "")
    if peermem:
        tree.write("sys/module/nvidia_peermem/version", "580.82.07")


def gpu(tree: Tree, index: int, pci: str, *, model: str = "NVIDIA H100 80GB HBM3", passed: bool = True) -> None:
    """A GPU on the bus; `passed` tells whether the container has been given it."""
    bus = pci.rpartition("/")[2]
    tree.write(f"sys/devices/{pci}/vendor", "0x10de")
    tree.write(f"sys/devices/{pci}/class", "0x030200")
    tree.link(f"sys/bus/pci/devices/{bus}", f"sys/devices/{pci}")
    information = f"Model: \t\t {model}\nIRQ:   \t\t 18\nBus Location: \t {bus}\nDevice Minor: \t {index}"
    tree.write(f"proc/driver/nvidia/gpus/{bus}/information", information)
    if index == 0:
        tree.write("proc/driver/nvidia/version", OPEN_DRIVER)
    if passed:
        tree.write(f"dev/nvidia{index}", "")


def amd_gpu(tree: Tree, index: int, pci: str, *, passed: bool = True) -> None:
    """An Instinct card; `passed` tells whether the container has been given it."""
    bus, minor = pci.rpartition("/")[2], 128 + index
    domain, number, device = (int(part, 16) for part in bus.partition(".")[0].split(":"))
    tree.write(f"sys/devices/{pci}/vendor", "0x1002")
    tree.write(f"sys/devices/{pci}/class", "0x120000")
    tree.link(f"sys/bus/pci/devices/{bus}", f"sys/devices/{pci}")
    # The container sees all of the machine's topology; node 0 is a processor.
    nodes = "sys/class/kfd/kfd/topology/nodes"
    tree.write(f"{nodes}/0/properties", "cpu_cores_count 96\nsimd_count 0\ndrm_render_minor 0")
    properties = {
        "cpu_cores_count": 0,
        "simd_count": 1216,
        "vendor_id": 4098,
        "location_id": number << 8 | device << 3,
        "domain": domain,
        "drm_render_minor": minor,
    }
    lines = "\n".join(f"{name} {value}" for name, value in properties.items())
    tree.write(f"{nodes}/{index + 1}/properties", lines)
    card = f"sys/class/drm/renderD{minor}/device"
    tree.write(f"{card}/product_name", "AMD Instinct MI300X OAM")
    tree.write(f"{card}/mem_info_vram_total", str(192 * GIB))
    tree.write(f"{card}/mem_info_vram_used", str(GIB // 4))
    tree.write(f"{card}/ras/umc_err_count", "ue: 0\nce: 3")
    if passed:
        tree.write("dev/kfd", "")
        tree.write(f"dev/dri/renderD{minor}", "")


def docker_bridge(tree: Tree, name: str = "docker0", address: str = "172.17.0.1/16") -> None:
    nic(tree, name, (address,), devtype="bridge", operstate="down")


def finish(tree: Tree) -> None:
    """Writes the address list, which /sys does not have."""
    tree.write("ip-addr.json", json.dumps(tree.links, indent=1))


def link_local(tail: str) -> str:
    """`a288:c2ff:fe3b:506a` as the GID of a port without an address."""
    return f"fe80:0000:0000:0000:{tail}"


def mapped(address: str) -> str:
    """An IPv4 address as sysfs prints its GID: 10.200.1.10 is ...:ffff:0ac8:010a."""
    digits = "".join(f"{int(part):02x}" for part in address.split("."))
    return f"0000:0000:0000:0000:0000:ffff:{digits[:4]}:{digits[4:]}"


def roce_gids(tail: str, address: str, netdev: str, base: str = "") -> list[tuple[str, str, str]]:
    """The usual table: link-local v1 and v2, then the IPv4 address v1 and v2. `base` is the netdev of the first two."""
    kinds = ("IB/RoCE v1", "RoCE v2")
    first = [(link_local(tail), kind, base or netdev) for kind in kinds]
    return first + ([(mapped(address), kind, netdev) for kind in kinds] if address else [])
