"""Ports for NCCL: what is rejected and why, what stands in the way, and which address NCCL will pick."""

from dataclasses import replace

import pytest

from app.host import Host
from app.host.accelerators.gpu import Gpu, Gpus
from app.host.limits import Limits
from app.host.nics import Nic
from app.host.rdma import Gid, RdmaPort, RdmaSoftware
from app.plan.gid import picked
from app.plan.rdma import choose
from tests.machines.tree import mapped
from tests.unit.launch_facts import card, decide, machine, planned, reason, refused, warned

SOFTWARE = RdmaSoftware(dev_infiniband=True, library=True, providers=("mlx5",))
GPUS = Gpus(visible=(Gpu(index=0),), direct="nvidia_peermem")
NODES = "10.0.0.1,10.0.0.2"
NIC = card("ens1", "10.0.0.2/24", speed=100000)


def gid(index: int, text: str, netdev: str = "ens1", kind: str = "RoCE v2") -> Gid:
    return Gid(index=index, text=text, kind=kind, netdev=netdev)


def roce(device: str = "mlx5_0", netdev: str = "ens1", rate: float = 100, **facts: object) -> RdmaPort:
    known = {"state": "ACTIVE", "uverbs": "uverbs0", "openable": True, "gids": (gid(3, mapped("10.0.0.2"), netdev),)}
    return RdmaPort(
        device=device,
        port=1,
        link_layer="Ethernet",
        rate=rate,
        netdevs=(netdev,),
        **{**known, **facts},  # type: ignore[arg-type]  # facts name RdmaPort's fields
    )


def infiniband(device: str, rate: float = 400, **facts: object) -> RdmaPort:
    known = {"state": "ACTIVE", "lid": 7, "sm_lid": 1, "uverbs": "uverbs0", "openable": True}
    return RdmaPort(device=device, port=1, link_layer="InfiniBand", rate=rate, **{**known, **facts})  # type: ignore[arg-type]  # as above


def gpu_host(*ports: RdmaPort, nics: tuple[Nic, ...] = (NIC,), **facts: object) -> Host:
    return machine(
        *nics,
        **{"gpus": GPUS, "rdma_ports": ports, "rdma_software": SOFTWARE, "container": True, **facts},
    )


def test_one_good_port_is_left_to_nccl() -> None:
    plan = planned(gpu_host(roce()), NODES=NODES)
    assert not [name for name in plan.script.env if name.startswith("NCCL_IB")]
    assert ("transport of NCCL", "RoCE") in plan.equal


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (roce("mlx5_9", netdev="ens9"), "its interface ens9 has no address"),
        (roce("mlx5_9", rate=25), "4 times slower than the fastest port"),
        (infiniband("mlx5_9", rate=50), "NCCL cannot mix link layers, and RoCE has 100 Gb/s here in all"),
        (infiniband("mlx5_9", lid=0), "no subnet manager has set it up"),
        (infiniband("mlx5_9", management=True), "it manages the NVLink switches"),
    ],
)
def test_nccl_is_kept_from_an_active_port_that_is_wrong(wrong: RdmaPort, why: str) -> None:
    host = gpu_host(roce(), wrong, nics=(NIC, card("ens9")))
    assert planned(host, NODES=NODES).script.env["NCCL_IB_HCA"] == "=mlx5_0:1"
    assert why in str(choose(host)[1][0])


def test_a_port_that_is_down_needs_no_list_since_nccl_skips_it() -> None:
    plan = planned(gpu_host(roce(), roce("mlx5_1", state="DOWN")), NODES=NODES)
    assert "NCCL_IB_HCA" not in plan.script.env


def test_an_address_on_a_vlan_over_a_bond_of_the_port_counts() -> None:
    nics = (card("ens1"), card("bond0", kind="bond"), card("bond0.7", "10.0.0.2/24", kind="vlan"))
    stack = (nics[0], replace(nics[1], lower=("ens1",)), replace(nics[2], lower=("bond0",)))
    assert [port.name for port in choose(gpu_host(roce(), nics=stack))[0]] == ["mlx5_0:1"]


def test_the_users_hca_wins() -> None:
    host = gpu_host(roce(), roce("mlx5_9", netdev="ens9"))
    plan = planned(host, NODES=NODES, NCCL_IB_HCA="mlx5_9")
    assert "NCCL_IB_HCA" not in plan.script.env
    assert reason(decide(host, NODES=NODES, NCCL_IB_HCA="mlx5_9"), "NCCL_IB_HCA") == (
        "as you set it, in place of =mlx5_0:1"
    )


def test_the_users_zero_leaves_nccl_an_active_port_that_is_not_usable() -> None:
    host = gpu_host(roce(netdev="ens9"))
    assert planned(host, NODES=NODES).network.transport == "sockets"
    plan = planned(host, NODES=NODES, NCCL_IB_DISABLE="0")
    assert (plan.network.transport, "NCCL_IB_DISABLE" in plan.script.env) == ("RoCE", False)
    (warning,) = plan.warnings
    assert (warning.id, warning.severity) == ("rdma.no-usable-port", "severe")
    assert warning.values == {"why": "mlx5_0:1 (RoCE 100 Gb/s): its interface ens9 has no address"}


def test_infiniband_that_is_switched_off_by_hand_is_told() -> None:
    host = gpu_host(infiniband("mlx5_0"))
    assert "400 Gb/s of RDMA on this machine stay unused" in warned(host, NODES=NODES, NCCL_IB_DISABLE="1")
    assert ("transport of NCCL", "sockets") in planned(host, NODES=NODES, NCCL_IB_DISABLE="1").equal


@pytest.mark.parametrize(
    ("software", "openable", "because"),
    [
        (replace(SOFTWARE, dev_infiniband=False), False, "/dev/infiniband is missing. Set HARDWARE=nvidia-ib"),
        (SOFTWARE, False, "/dev/infiniband/uverbs0 (mlx5_0) is missing or not open to user 0"),
        (replace(SOFTWARE, library=False), True, "libibverbs.so.1 is not installed"),
        (replace(SOFTWARE, providers=()), True, "no driver of libibverbs is installed. Add the package"),
    ],
)
def test_what_keeps_the_container_from_infiniband_is_said_with_its_fix(
    software: RdmaSoftware, openable: bool, because: str
) -> None:
    host = gpu_host(infiniband("mlx5_0", openable=openable), rdma_software=software)
    assert f"InfiniBand is on this machine but the container cannot use it: {because}" in warned(host, NODES=NODES)
    assert planned(host, NODES=NODES).script.env["NCCL_IB_DISABLE"] == "1"


def test_a_cpu_job_is_not_bothered_with_infiniband() -> None:
    host = gpu_host(infiniband("mlx5_0", openable=False), gpus=Gpus())
    assert warned(host, NODES=NODES, HARDWARE="cpu") == ""


def test_too_little_locked_memory_is_refused_where_rdma_will_be_used() -> None:
    low = Limits(cpus=8, memlock=8 << 20)
    text = refused(gpu_host(infiniband("m"), limits=low), NODES=NODES)
    assert "the limit of locked memory is 8192 KiB, and RDMA registers more. Set HARDWARE=nvidia-ib, which" in text
    assert planned(gpu_host(limits=low), NODES=NODES).workers.backend == "nccl"
    may = replace(low, may_lock=True)
    assert planned(gpu_host(infiniband("m"), limits=may), NODES=NODES).workers.backend == "nccl"


def test_gpu_memory_through_the_cpu_is_told() -> None:
    host = gpu_host(infiniband("m"), gpus=replace(GPUS, direct=""))
    assert "modprobe nvidia-peermem" in warned(host, NODES=NODES)


def test_nccl_picks_the_first_roce_v2_entry_with_an_ipv4_address() -> None:
    table = (
        gid(0, "fe80:0000:0000:0000:0000:0000:0000:0001"),
        gid(2, mapped("10.0.0.2"), kind="IB/RoCE v1"),
        gid(3, mapped("10.0.0.2")),
        gid(5, mapped("10.9.0.2")),
    )
    port = roce(gids=table)
    assert picked(port) == table[2]
    assert picked(port, version=6) is None
    assert reason(decide(gpu_host(port), NODES=NODES), "RoCE GID").startswith("what NCCL picks by itself")


def test_a_port_with_addresses_in_two_networks_is_kept_to_that_of_the_nodes() -> None:
    table = (gid(3, mapped("10.9.0.2"), "ens1.9"), gid(5, mapped("10.0.0.2")))
    nics = (NIC, card("ens1.9", "10.9.0.2/24", kind="vlan"))
    plan = planned(gpu_host(roce(gids=table), nics=nics), NODES=NODES)
    assert plan.script.env["NCCL_IB_ADDR_RANGE"] == "10.0.0.0/24"
    own = planned(gpu_host(roce(gids=table), nics=nics), NODES=NODES, NCCL_IB_GID_INDEX="5")
    assert "NCCL_IB_ADDR_RANGE" not in own.script.env


def test_a_port_without_a_routable_address_is_told() -> None:
    table = (gid(0, "fe80:0000:0000:0000:0000:0000:0000:0001"),)
    assert "has no RoCE v2 address" in warned(gpu_host(roce(gids=table)), NODES=NODES)


def test_a_slow_listed_network_beside_a_fast_one_with_rdma_is_told() -> None:
    fast = card("ens9", "10.9.0.2/24", speed=100000)
    slow = card("eno1", "10.0.0.2/24", speed=1000)
    text = warned(gpu_host(roce(netdev="ens9"), nics=(slow, fast)), NODES=NODES)
    assert "eno1 (1 Gb/s) carries 10.0.0.2, but ens9 (100 Gb/s, with RDMA) has 10.9.0.2" in text


def test_a_link_that_is_down_and_a_tunnel_are_told() -> None:
    assert "its link is down" in warned(machine(card("ens1", "10.0.0.2/24", up=False)), NODES=NODES)
    assert "is a tunnel" in warned(machine(card("wg0", "10.0.0.2/24", kind="tunnel")), NODES=NODES)


def test_twin_ports_with_different_mtu_are_told() -> None:
    twin = ("pci0000:40", "0000:40:01.1", "0000:41:00.0")
    one = replace(NIC, pci=twin, mtu=9000)
    other = replace(card("ens2", "10.0.1.2/24"), pci=(*twin[:2], "0000:41:00.1"), mtu=1500)
    assert "ens1 has MTU 9000, its twin ens2 has 1500" in warned(machine(one, other), NODES=NODES)


def test_two_cards_in_one_subnet_that_answer_for_each_other_are_told() -> None:
    other = card("ens2", "10.0.0.102/24")
    assert "ens1 and ens2 are both in 10.0.0.0/24" in warned(machine(NIC, other), NODES=NODES)
    assert warned(machine(NIC, replace(other, arp_ignore=1)), NODES=NODES) == ""
    assert warned(machine(NIC, replace(other, up=False)), NODES=NODES) == ""
    assert warned(machine(NIC, card("ens2", "10.0.1.102/24")), NODES=NODES) == ""
