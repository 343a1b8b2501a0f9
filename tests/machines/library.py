"""The machines: each function builds one below a folder and returns the environment that its user has set.

Values are those of real machines: gpud's test data (H100), NVIDIA's DGX documentation, host reports in NCCL's issues.
"""

from collections.abc import Callable
from pathlib import Path

from tests.machines.tree import (
    Tree,
    amd_gpu,
    basics,
    docker_bridge,
    finish,
    gpu,
    hca,
    link_local,
    nic,
    rdma_software,
    roce_gids,
)

CUDA_TORCH = "2.13.0"
CLASSIC_NODES = "192.168.5.228,192.168.5.229"


def laptop(root: Path) -> dict[str, str]:
    """Ethernet, a wireless card that is down, Docker's bridge; no GPU. Node 0 of two."""
    tree = Tree(root)
    basics(tree, hostname="laptop", cpus=8)
    nic(tree, "enp0s31f6", ("192.168.178.23/24",), pci="pci0000:00/0000:00:1f.6", speed=1000)
    nic(tree, "wlp0s20f3", pci="pci0000:00/0000:00:14.3", operstate="down", devtype="wlan")
    docker_bridge(tree)
    finish(tree)
    return {"NODES": "192.168.178.23,192.168.178.40", "NPROC_PER_NODE": "2"}


def classic_a(root: Path) -> dict[str, str]:
    """First host of the classic script: the fabric is the second port of a RoCE card, the first one is not plugged."""
    tree = Tree(root)
    basics(tree, hostname="gpu-a", cpus=64, torch=CUDA_TORCH)
    nic(tree, "eno1", ("10.10.0.11/16",), pci="pci0000:00/0000:00:1d.0/0000:02:00.0", speed=1000)
    card = "pci0000:40/0000:40:01.1/0000:41:00"
    nic(tree, "ens6f0np0", pci=f"{card}.0", operstate="down")
    nic(tree, "ens6f1np1", ("192.168.5.228/24",), pci=f"{card}.1", speed=100000, mtu=9000)
    down = [(link_local("0ac0:ebff:fe10:0001"), "RoCE v2", "ens6f0np0")]
    hca(tree, "mlx5_0", f"{card}.0", layer="Ethernet", state="1: DOWN", rate="40 Gb/sec (4X QDR)", gids=down)
    gids = roce_gids("0ac0:ebff:fe10:0002", "192.168.5.228", "ens6f1np1")
    hca(tree, "mlx5_1", f"{card}.1", layer="Ethernet", rate="100 Gb/sec (4X EDR)", gids=gids, number=1)
    rdma_software(tree)
    gpu(tree, 0, "pci0000:40/0000:40:03.1/0000:43:00.0", model="NVIDIA A100-PCIE-40GB")
    gpu(tree, 1, "pci0000:80/0000:80:01.1/0000:81:00.0", model="NVIDIA A100-PCIE-40GB")
    docker_bridge(tree)
    finish(tree)
    return {"NODES": CLASSIC_NODES, "HARDWARE": "nvidia-ib", "NPROC_PER_NODE": "gpu"}


def classic_b(root: Path) -> dict[str, str]:
    """Second host: another interface name, and a first port that is plugged but has no address."""
    tree = Tree(root)
    basics(tree, hostname="gpu-b", cpus=64, torch=CUDA_TORCH)
    nic(tree, "enp4s0", ("10.10.0.12/16",), pci="pci0000:00/0000:00:1c.4/0000:04:00.0", speed=1000)
    card = "pci0000:ae/0000:ae:00.0/0000:af:00"
    nic(tree, "enp175s0f0np0", pci=f"{card}.0", speed=100000)
    nic(tree, "enp175s0f1np1", ("192.168.5.229/24",), pci=f"{card}.1", speed=100000, mtu=9000)
    idle = roce_gids("0ac0:ebff:fe20:0001", "", "enp175s0f0np0")
    hca(tree, "mlx5_0", f"{card}.0", layer="Ethernet", rate="100 Gb/sec (4X EDR)", gids=idle)
    gids = roce_gids("0ac0:ebff:fe20:0002", "192.168.5.229", "enp175s0f1np1")
    hca(tree, "mlx5_1", f"{card}.1", layer="Ethernet", rate="100 Gb/sec (4X EDR)", gids=gids, number=1)
    rdma_software(tree)
    gpu(tree, 0, "pci0000:ae/0000:ae:02.0/0000:b1:00.0", model="NVIDIA A100-PCIE-40GB")
    gpu(tree, 1, "pci0000:d7/0000:d7:00.0/0000:d8:00.0", model="NVIDIA A100-PCIE-40GB")
    finish(tree)
    return {"NODES": CLASSIC_NODES, "HARDWARE": "nvidia-ib", "NPROC_PER_NODE": "gpu"}


def dgx_h100(root: Path) -> dict[str, str]:
    """Eight GPUs, each behind a PCI switch with its InfiniBand port; a RoCE bond of two ports for all else."""
    tree = Tree(root)
    basics(tree, hostname="dgx-01", cpus=224, shm=16 << 30, torch=CUDA_TORCH)
    for index, (number, device) in enumerate(
        zip((0, 1, 4, 5, 6, 7, 8, 9), ["15", "26", "37", "46", "95", "a6", "b7", "c6"], strict=True)
    ):
        switch = f"pci0000:{device}/0000:{device}:01.0/0000:{int(device, 16) + 1:02x}:00.0"
        bus = int(device, 16) + 2
        below = f"{switch}/0000:{bus:02x}:00.0/0000:{bus + 1:02x}:00.0"
        nic(tree, f"ibp{bus + 1}s0", pci=below, kind=32, mtu=4092, speed=400000)
        gid = [(link_local(f"a088:c203:005f:c2{index}6"), "", "")]
        hca(tree, f"mlx5_{number}", below, lid=0x1A + index, sm_lid=1, gids=gid, number=number)
        gpu(tree, index, f"{switch}/0000:{bus:02x}:01.0/0000:{bus + 2:02x}:00.0")
    card = "pci0000:e0/0000:e0:01.0/0000:e1:00"
    for port in (0, 1):
        nic(tree, f"ens6f{port}np{port}", pci=f"{card}.{port}", speed=100000, mtu=9000)
    nic(tree, "bond0", ("10.0.8.1/22",), devtype="bond", lower=("ens6f0np0", "ens6f1np1"), speed=200000, mtu=9000)
    gids = roce_gids("5aa2:e1ff:fe11:2233", "10.0.8.1", "bond0")
    hca(tree, "mlx5_bond_0", f"{card}.0", layer="Ethernet", rate="200 Gb/sec (2X NDR)", gids=gids, number=10)
    rdma_software(tree)
    docker_bridge(tree)
    finish(tree)
    return {"NODES": "10.0.8.1,10.0.8.2,10.0.8.3,10.0.8.4", "HARDWARE": "nvidia-ib"}


def roce_vlan(root: Path) -> dict[str, str]:
    """RoCE whose address is on a VLAN of the port; the port itself has none."""
    tree = Tree(root)
    basics(tree, hostname="rail-7", cpus=96, torch=CUDA_TORCH)
    switch = "pci0000:15/0000:15:01.0/0000:16:00.0"
    card = f"{switch}/0000:17:00.0/0000:18:00.0"
    nic(tree, "ens10np0", pci=card, speed=400000, mtu=9000)
    nic(tree, "ens10np0.100", ("10.100.1.7/24",), devtype="vlan", lower=("ens10np0",), mtu=9000)
    gids = roce_gids("a288:c2ff:fe3b:506a", "10.100.1.7", "ens10np0.100", base="ens10np0")
    hca(tree, "mlx5_6", card, layer="Ethernet", gids=gids)
    rdma_software(tree)
    gpu(tree, 0, f"{switch}/0000:17:01.0/0000:19:00.0")
    finish(tree)
    return {"NODES": "10.100.1.6,10.100.1.7", "HARDWARE": "nvidia-ib"}


def bond(root: Path) -> dict[str, str]:
    """Two ports as one 802.3ad bond with one RoCE device; one member's MTU was forgotten."""
    tree = Tree(root)
    basics(tree, hostname="bond-2", cpus=48, torch=CUDA_TORCH)
    card = "pci0000:98/0000:98:01.0/0000:99:00"
    nic(tree, "ens1f0np0", pci=f"{card}.0", speed=100000, mtu=9000)
    nic(tree, "ens1f1np1", pci=f"{card}.1", speed=100000, mtu=1500)
    nic(tree, "bond0", ("10.20.0.2/24",), devtype="bond", lower=("ens1f0np0", "ens1f1np1"), mtu=9000)
    gids = roce_gids("b83f:d2ff:fe44:5566", "10.20.0.2", "bond0")
    hca(tree, "mlx5_bond_0", f"{card}.0", layer="Ethernet", rate="100 Gb/sec (4X EDR)", gids=gids)
    rdma_software(tree, peermem=False)
    for index in range(4):
        gpu(tree, index, f"pci0000:{index}8/0000:{index}8:01.0/0000:{index}9:00.0", model="NVIDIA L40S")
    finish(tree)
    return {"NODES": "10.20.0.1,10.20.0.2", "HARDWARE": "nvidia-ib", "NPROC_PER_NODE": "4"}


def dgx_spark(root: Path) -> dict[str, str]:
    """One GPU; each port of the card is two PCI functions, one port is not plugged; 10 GbE besides."""
    tree = Tree(root)
    basics(tree, hostname="spark-a", cpus=20, torch=CUDA_TORCH)
    nic(tree, "enP7s7", ("10.0.0.12/24",), pci="pci0007:00/0007:00:00.0/0007:01:00.0", speed=10000)
    for domain, prefix, address in (("0000", "p1", "192.168.200.12"), ("0002", "P2p1", "192.168.201.12")):
        for port, up in ((0, True), (1, False)):
            pci = f"pci{domain}:00/{domain}:00:00.0/{domain}:01:00.{port}"
            name = f"en{prefix}s0f{port}np{port}"
            addresses = (f"{address}/24",) if up else ()
            nic(
                tree, name, addresses, pci=pci, operstate="up" if up else "down", speed=200000 if up else None, mtu=9000
            )
            tail = f"4cbb:47ff:fe{port}0:000{len(prefix)}"
            hca(
                tree,
                f"roce{prefix}s0f{port}",
                pci,
                layer="Ethernet",
                state="4: ACTIVE" if up else "1: DOWN",
                rate="200 Gb/sec (4X HDR)" if up else "40 Gb/sec (4X QDR)",
                gids=roce_gids(tail, address if up else "", name),
                number=2 * (domain == "0002") + port,
            )
    rdma_software(tree, peermem=False)
    gpu(tree, 0, "pci000f:00/000f:00:00.0/000f:01:00.0", model="NVIDIA GB10")
    finish(tree)
    return {"NODES": "192.168.200.12,192.168.200.13", "HARDWARE": "nvidia-ib"}


def _ib_host(root: Path, *, state: str, lid: int, nodes: bool = True, hardware: str = "nvidia-ib") -> dict[str, str]:
    tree = Tree(root)
    basics(tree, hostname="ib-1", cpus=32, torch=CUDA_TORCH)
    nic(tree, "eno1np0", ("10.1.0.1/24",), pci="pci0000:00/0000:00:02.0/0000:03:00.0", speed=25000)
    for index in (0, 1):
        pci = f"pci0000:{index}4/0000:{index}4:01.0/0000:{index}5:00.0"
        active = index == 0 and state != "4: ACTIVE"
        nic(tree, f"ibs{index + 1}", pci=pci, kind=32, mtu=2044)
        hca(
            tree,
            f"mlx5_{index}",
            pci,
            state=state if active or lid == 0 else "4: ACTIVE",
            rate="200 Gb/sec (4X HDR)",
            lid=lid,
            sm_lid=1 if lid else 0,
            gids=[(link_local(f"e8eb:d303:0001:000{index}"), "", "")],
            number=index,
            node=nodes,
        )
        gpu(tree, index, f"pci0000:{index}4/0000:{index}4:03.0/0000:{index}7:00.0", model="NVIDIA A100-SXM4-80GB")
    rdma_software(tree)
    finish(tree)
    return {"NODES": "10.1.0.1,10.1.0.2", "HARDWARE": hardware}


def ib_without_subnet_manager(root: Path) -> dict[str, str]:
    """InfiniBand cards with a link, but nobody runs opensm."""
    return _ib_host(root, state="2: INIT", lid=0)


def ib_port_down(root: Path) -> dict[str, str]:
    """Two InfiniBand cards, one without a cable."""
    return _ib_host(root, state="1: DOWN", lid=0x2C)


def ib_without_device_nodes(root: Path) -> dict[str, str]:
    """InfiniBand on the machine, but the container was started without it."""
    return _ib_host(root, state="4: ACTIVE", lid=0x2C, nodes=False, hardware="nvidia")


def cloud_vm(root: Path) -> dict[str, str]:
    """A virtual machine: a host address (/32), a jumbo-less MTU, one GPU, no RDMA."""
    tree = Tree(root)
    basics(tree, hostname="vm-1", cpus=4, torch=CUDA_TORCH, memlock="8388608")
    nic(tree, "ens4", ("10.128.0.5/32",), pci="pci0000:00/0000:00:04.0", mtu=1460)
    gpu(tree, 0, "pci0000:00/0000:00:05.0", model="Tesla T4")
    docker_bridge(tree)
    finish(tree)
    return {"NODES": "10.128.0.5,10.128.0.6", "HARDWARE": "nvidia"}


def ipv6_only(root: Path) -> dict[str, str]:
    """No IPv4 at all; names in NODES; RoCE with IPv6 addresses."""
    tree = Tree(root)
    basics(tree, hostname="six", cpus=16, torch=CUDA_TORCH)
    card = "pci0000:40/0000:40:01.0/0000:41:00.0"
    nic(tree, "enp65s0np0", ("2001:db8:7::2/64", "fe80::a288:c2ff:fe3b:506a/64"), pci=card, speed=100000, mtu=9000)
    gids = [
        *roce_gids("a288:c2ff:fe3b:506a", "", "enp65s0np0"),
        ("2001:0db8:0007:0000:0000:0000:0000:0002", "IB/RoCE v1", "enp65s0np0"),
        ("2001:0db8:0007:0000:0000:0000:0000:0002", "RoCE v2", "enp65s0np0"),
    ]
    hca(tree, "mlx5_0", card, layer="Ethernet", rate="100 Gb/sec (4X EDR)", gids=gids)
    rdma_software(tree)
    gpu(tree, 0, "pci0000:40/0000:40:03.0/0000:43:00.0", model="NVIDIA A10")
    tree.write("names.json", '{"seven": ["2001:db8:7::1"], "six": ["2001:db8:7::2"]}')
    finish(tree)
    return {"NODES": "seven,six", "HARDWARE": "nvidia-ib"}


def many_bridges(root: Path) -> dict[str, str]:
    """Docker's bridge and ten more, some of whose addresses are those of other nodes' bridges too."""
    tree = Tree(root)
    basics(tree, hostname="builder", cpus=16)
    docker_bridge(tree)
    for index in range(10):
        docker_bridge(tree, f"br-{index:012x}", f"172.{18 + index}.0.1/16")
        nic(tree, f"veth{index:07x}")
    nic(tree, "virbr0", ("192.168.122.1/24",), devtype="bridge", operstate="down")
    nic(tree, "enp1s0", ("172.18.5.11/24",), pci="pci0000:00/0000:00:1c.0/0000:01:00.0", speed=10000)
    finish(tree)
    return {"NODES": "172.18.5.10,172.18.5.11,172.18.0.1", "NPROC_PER_NODE": "1"}


def hgx_b200(root: Path) -> dict[str, str]:
    """Eight InfiniBand ports beside the GPUs, and two cards on the base board that only manage NVLink switches."""
    tree = Tree(root)
    basics(tree, hostname="b200-3", cpus=192, shm=16 << 30, torch=CUDA_TORCH)
    nic(tree, "eno1", ("10.30.0.3/24",), pci="pci0000:00/0000:00:02.0/0000:03:00.0", speed=25000)
    for index in range(8):
        switch = f"pci0000:{index + 1}0/0000:{index + 1}0:01.0/0000:{index + 1}1:00.0"
        card = f"{switch}/0000:{index + 1}2:00.0/0000:{index + 1}3:00.0"
        nic(tree, f"ibp{index}s0", pci=card, kind=32, mtu=4092)
        gid = [(link_local(f"9c63:c003:00a0:000{index}"), "", "")]
        hca(tree, f"mlx5_{index + 4}", card, lid=0x40 + index, sm_lid=1, gids=gid, number=index + 4)
        gpu(tree, index, f"{switch}/0000:{index + 1}2:01.0/0000:{index + 1}4:00.0", model="NVIDIA B200")
    for index in range(4):
        card = f"pci0000:c0/0000:c0:0{index + 1}.0/0000:c{index + 1}:00.0"
        gid = [(link_local(f"9c63:c003:00b0:000{index}"), "", "")]
        vpd = "ConnectX-7 VPD ... SMDL SW_MNG" if index < 2 else ""
        hca(tree, f"mlx5_{index}", card, lid=1 + index, sm_lid=1, gids=gid, number=index, vpd=vpd)
    rdma_software(tree)
    finish(tree)
    return {"NODES": "10.30.0.3,10.30.0.4", "HARDWARE": "nvidia-ib"}


def aws_p5(root: Path) -> dict[str, str]:
    """Two GPUs and two EFA cards, whose link layer is neither InfiniBand nor Ethernet; no plugin in the image."""
    tree = Tree(root)
    basics(tree, hostname="ip-10-1-0-11", cpus=192, shm=16 << 30, torch=CUDA_TORCH)
    nic(tree, "enp71s0", ("10.1.0.11/20",), pci="pci0000:44/0000:44:00.0/0000:47:00.0", speed=100000, mtu=9001)
    for index in (0, 1):
        card = f"pci0000:4{index}/0000:4{index}:01.0/0000:5{index}:00.0"
        hca(
            tree,
            f"rdmap8{index}s0",
            card,
            layer="Unknown",
            rate="100 Gb/sec (4X EDR)",
            gids=[(link_local(f"083e:9bff:fe00:000{index}"), "", "")],
            number=index,
            vendor=0x1D0F,
        )
        gpu(tree, index, f"pci0000:4{index}/0000:4{index}:02.0/0000:6{index}:00.0")
    rdma_software(tree, peermem=False)
    finish(tree)
    return {"NODES": "10.1.0.11,10.1.0.12", "HARDWARE": "nvidia-ib"}


def mi300x(root: Path) -> dict[str, str]:
    """Two AMD GPUs of four, with RoCE; torch for ROCm."""
    tree = Tree(root)
    basics(tree, hostname="mi300-2", cpus=96, shm=16 << 30, torch="2.13.0+rocm7.0")
    card = "pci0000:c0/0000:c0:01.1/0000:c1:00.0"
    nic(tree, "ens3np0", ("10.7.0.2/24",), pci=card, speed=400000, mtu=9000)
    hca(tree, "mlx5_0", card, layer="Ethernet", gids=roce_gids("a288:c2ff:fe3b:0001", "10.7.0.2", "ens3np0"))
    for index in range(4):
        amd_gpu(tree, index, f"pci0000:{index}5/0000:{index}5:01.1/0000:{index}6:00.0", passed=index < 2)
    tree.write("sys/module/amdgpu/version", "6.12.12")
    rdma_software(tree, peermem=False)
    finish(tree)
    return {"NODES": "10.7.0.1,10.7.0.2", "HARDWARE": "rocm"}


MACHINES: dict[str, Callable[[Path], dict[str, str]]] = {
    build.__name__: build
    for build in (
        laptop,
        classic_a,
        classic_b,
        dgx_h100,
        roce_vlan,
        bond,
        dgx_spark,
        ib_without_subnet_manager,
        ib_port_down,
        ib_without_device_nodes,
        cloud_vm,
        ipv6_only,
        many_bridges,
        hgx_b200,
        aws_p5,
        mi300x,
    )
}
