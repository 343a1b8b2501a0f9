"""Each machine of the library: what a reader can check by eye, and the whole plan as a file.

`TORCHRUN_COMPOSE_UPDATE=1 pytest tests/unit/test_machines.py` writes the files anew; read the difference.
"""

import json
import os
from pathlib import Path

import pytest

from app.cli.explain import short, to_json, to_lines
from app.plan import Draft, Plan
from tests.machines.facts import drafted
from tests.machines.library import MACHINES

FILES = Path(__file__).parents[1] / "machines"

EIGHT = "=mlx5_0:1,mlx5_1:1,mlx5_4:1,mlx5_5:1,mlx5_6:1,mlx5_7:1,mlx5_8:1,mlx5_9:1"
B200 = "=" + ",".join(f"mlx5_{index}:1" for index in range(4, 12))

EXPECTED: dict[str, tuple[int, str, str, int, str, dict[str, str]]] = {
    # machine: rank, interface, address, processes, backend, the NCCL_IB_* and address variables
    "laptop": (0, "enp0s31f6", "192.168.178.23", 2, "gloo", {"NCCL_IB_DISABLE": "1"}),
    "classic_a": (0, "ens6f1np1", "192.168.5.228", 2, "nccl", {}),
    "classic_b": (1, "enp175s0f1np1", "192.168.5.229", 2, "nccl", {"NCCL_IB_HCA": "=mlx5_1:1"}),
    "dgx_h100": (0, "bond0", "10.0.8.1", 8, "nccl", {"NCCL_IB_HCA": EIGHT}),
    "roce_vlan": (1, "ens10np0.100", "10.100.1.7", 1, "nccl", {}),
    "bond": (1, "bond0", "10.20.0.2", 4, "nccl", {}),
    "dgx_spark": (0, "enp1s0f0np0", "192.168.200.12", 1, "nccl", {}),
    "ib_without_subnet_manager": (0, "eno1np0", "10.1.0.1", 2, "nccl", {"NCCL_IB_DISABLE": "1"}),
    "ib_port_down": (0, "eno1np0", "10.1.0.1", 2, "nccl", {}),
    "ib_without_device_nodes": (0, "eno1np0", "10.1.0.1", 2, "nccl", {"NCCL_IB_DISABLE": "1"}),
    "cloud_vm": (0, "ens4", "10.128.0.5", 1, "nccl", {"NCCL_IB_DISABLE": "1"}),
    "ipv6_only": (1, "enp65s0np0", "2001:db8:7::2", 1, "nccl", {"NCCL_IB_ADDR_FAMILY": "AF_INET6"}),
    "many_bridges": (1, "enp1s0", "172.18.5.11", 1, "gloo", {"NCCL_IB_DISABLE": "1"}),
    "hgx_b200": (0, "eno1", "10.30.0.3", 8, "nccl", {"NCCL_IB_HCA": B200}),
    "aws_p5": (0, "enp71s0", "10.1.0.11", 2, "nccl", {"NCCL_IB_DISABLE": "1"}),
    "mi300x": (1, "ens3np0", "10.7.0.2", 2, "nccl", {}),
}

WARNED = {
    "bond": "network.twin-mtu",
    "ib_without_subnet_manager": "rdma.no-usable-port",
    "ib_without_device_nodes": "rdma.no-device-nodes",
    "aws_p5": "rdma.efa-without-plugin",
}


def plan_of(found: Draft) -> Plan:
    assert found.plan is not None, found.problems
    return found.plan


def test_every_machine_has_an_expectation() -> None:
    assert EXPECTED.keys() == MACHINES.keys()


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_gets_the_rank_card_and_variables_that_its_owner_would_choose(name: str, tmp_path: Path) -> None:
    rank, interface, address, nproc, backend, infiniband = EXPECTED[name]
    plan = plan_of(drafted(name, tmp_path))
    assert (plan.nodes.rank, plan.network.interface, plan.network.address) == (rank, interface, address)
    assert (plan.workers.nproc, plan.workers.backend) == (nproc, backend)
    assert plan.script.env["NCCL_SOCKET_IFNAME"] == f"={interface}"
    assert plan.script.env["GLOO_SOCKET_IFNAME"] == interface
    assert {key: value for key, value in plan.script.env.items() if key.startswith("NCCL_IB_")} == infiniband


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_is_warned_about_exactly_what_is_wrong_with_it(name: str, tmp_path: Path) -> None:
    ids = [each.id for each in plan_of(drafted(name, tmp_path)).warnings]
    assert ids == ([WARNED[name]] if name in WARNED else [])


@pytest.mark.parametrize("name", MACHINES)
def test_the_whole_plan_and_its_explanation_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    found = drafted(name, tmp_path)
    whole = json.dumps(json.loads(to_json(found))["plan"], indent=2)
    text = "\n\n".join([MACHINES[name].__doc__ or "", to_lines(found), short(plan_of(found)), whole]) + "\n"
    file = FILES / f"{name}.txt"
    if os.environ.get("TORCHRUN_COMPOSE_UPDATE"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_no_file_is_left_of_a_machine_that_is_gone() -> None:
    assert {file.stem for file in FILES.glob("*.txt")} == MACHINES.keys()


def test_both_hosts_of_the_classic_script_agree(tmp_path: Path) -> None:
    first, second = plan_of(drafted("classic_a", tmp_path / "a")), plan_of(drafted("classic_b", tmp_path / "b"))
    assert first.equal == second.equal
    assert first.nodes.addresses == second.nodes.addresses
    assert first.script.env["NCCL_SOCKET_IFNAME"] != second.script.env["NCCL_SOCKET_IFNAME"]


@pytest.mark.parametrize(
    ("name", "variable", "value", "transport", "network", "warning"),
    [
        ("classic_a", "NCCL_IB_HCA", "mlx5_0", "sockets", "sockets only", "rdma.hca-selects-wrong"),
        ("classic_a", "NCCL_IB_HCA", "=mlx5_1:2", "sockets", "sockets only", "rdma.hca-selects-none"),
        ("classic_a", "NCCL_IB_HCA", "mlx5_9", "sockets", "sockets only", "rdma.hca-selects-none"),
        ("classic_a", "NCCL_IB_HCA", "mlx5", "RoCE", "RDMA through mlx5_1:1", ""),
        ("classic_a", "NCCL_NET", "Socket", "sockets", "sockets only", "rdma.unused"),
        ("classic_a", "NCCL_IB_DISABLE", "1", "sockets", "sockets only", "rdma.unused"),
        ("classic_b", "NCCL_IB_HCA", "=mlx5_0:1", "RoCE", "RDMA through mlx5_0:1", "rdma.hca-selects-wrong"),
        ("hgx_b200", "NCCL_IB_HCA", "=mlx5_4,mlx5_5", "InfiniBand", "RDMA through mlx5_4:1,mlx5_5:1", ""),
        (
            "hgx_b200",
            "NCCL_IB_HCA",
            "=mlx5_0,mlx5_4",
            "InfiniBand",
            "RDMA through mlx5_0:1,mlx5_4:1",
            "rdma.hca-selects-wrong",
        ),
    ],
)
def test_the_transport_is_what_nccl_makes_of_the_users_variables(
    name: str, variable: str, value: str, transport: str, network: str, warning: str, tmp_path: Path
) -> None:
    plan = plan_of(drafted(name, tmp_path, **{variable: value}))
    assert plan.network.transport == transport
    assert f", {network}" in short(plan).splitlines()[1]
    assert [each.id for each in plan.warnings] == ([warning] if warning else [])


def test_nothing_is_said_of_ports_and_addresses_that_nccl_will_not_choose(tmp_path: Path) -> None:
    off = {each.name for each in drafted("classic_a", tmp_path / "a", NCCL_IB_DISABLE="1").decisions}
    assert not off & {"NCCL_IB_HCA", "RoCE GID"}
    own = {each.name for each in drafted("classic_a", tmp_path / "b", NCCL_IB_GID_INDEX="0").decisions}
    assert "RoCE GID" not in own


def test_gpus_of_another_kind_are_a_fact_that_nodes_compare(tmp_path: Path) -> None:
    gpus = {name: dict(plan_of(drafted(name, tmp_path / name)).equal).get("gpus") for name in ("classic_a", "laptop")}
    assert gpus == {"classic_a": "2 x NVIDIA A100-PCIE-40GB", "laptop": None}


def test_nodes_that_would_mix_infiniband_and_sockets_do_not_agree(tmp_path: Path) -> None:
    with_it = plan_of(drafted("ib_port_down", tmp_path / "a"))
    without = plan_of(drafted("ib_without_device_nodes", tmp_path / "b"))
    assert set(with_it.equal) ^ set(without.equal) == {
        ("transport of NCCL", "InfiniBand"),
        ("transport of NCCL", "sockets"),
    }
