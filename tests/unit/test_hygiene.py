"""Copied values, misspelt names, stray PET_*: kept or removed, and always told."""

from dataclasses import replace

import pytest

from app.host.nccl_names import matching
from app.host.rdma import RdmaPort
from app.plan.env_warnings import COSTS
from app.plan.typos import known_variables, misspelt
from tests.unit.launch_facts import DOCKER, card, decide, given, machine, planned, warned, warning_ids

HOST = machine(card("eth0", "10.0.0.1/24"))
HARMFUL = {
    "NCCL_NET_GDR_LEVEL": "SYS",
    "NCCL_IB_GID_INDEX": "3",
    "NCCL_CUMEM_ENABLE": "0",
    "TORCH_FR_BUFFER_SIZE": "0",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    "NCCL_DEBUG": "TRACE",
    "NCCL_SOCKET_NTHREADS": "32",
    "GLOO_DEVICE_TRANSPORT": "IBVERBS",
}
HARMLESS = {"NCCL_IB_GID_INDEX": "-1", "NCCL_NET_GDR_LEVEL": "PHB", "NCCL_DEBUG": "INFO", "NCCL_P2P_DISABLE": "0"}


@pytest.mark.parametrize("name", COSTS)
def test_a_harmful_value_is_kept_with_a_warning_that_says_what_it_costs(name: str) -> None:
    value = HARMFUL.get(name, "1")
    found = decide(HOST, **{name: value})
    assert found.plan is not None
    assert name not in found.plan.script.env
    assert name not in found.plan.script.removed
    (warning,) = [each for each in found.warnings if each.setting == name]
    assert warning.id.partition(".")[2] == name.lower().replace("_", "-")
    assert warning.message.startswith(f"{name}={value} (environment) is kept: ")


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_value_is_not_warned_about(name: str) -> None:
    assert warned(HOST, **{name: HARMLESS[name]}) == ""


def test_every_costly_variable_is_a_known_one() -> None:
    assert COSTS.keys() <= known_variables()


@pytest.mark.parametrize(
    ("value", "why"),
    [("^lo,docker", "Gloo knows no ^ and no ="), ("=eth0", "only plain names"), ("eth9", "is no interface here")],
)
def test_nccls_syntax_in_gloos_variable_is_told(value: str, why: str) -> None:
    assert why in warned(HOST, GLOO_SOCKET_IFNAME=value)


def test_an_interface_pattern_that_matches_nothing_is_told() -> None:
    assert "matches no interface here (lo, eth0)" in warned(HOST, NCCL_SOCKET_IFNAME="=eth1")
    assert warned(HOST, NCCL_SOCKET_IFNAME="^docker") == ""


ON_TWO = {"NODES": "10.0.0.1,10.0.0.2"}
FAST = card("fast0", "10.9.0.1/24", speed=100_000)
SLOW = card("slow0", "10.8.0.1/24", speed=1000)
TWIN = replace(card("eth1", "10.0.0.9/24", speed=1000), arp_ignore=1)
MANY = machine(
    card("eth0", "10.0.0.1/24", speed=10_000), FAST, SLOW, TWIN, card("eth2", up=False), card("eth3"), DOCKER
)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "lo",
            "lo has 127.0.0.1, ::1, and this node's address 10.0.0.1 is on eth0: the other nodes would try to connect "
            "to lo",
        ),
        ("docker0", "docker0 has 172.17.0.1, and"),
        ("eth2", "eth2 is down, and"),
        ("eth3", "eth3 has no address, and"),
        (
            "slow0",
            "slow0 has 10.8.0.1, and this node's address 10.0.0.1 is on eth0: the other nodes would be sent to slow0",
        ),
    ],
)
def test_an_interface_that_does_not_lead_to_this_node_is_told(name: str, why: str) -> None:
    text = warned(MANY, **ON_TWO, GLOO_SOCKET_IFNAME=name)
    assert text.startswith(f"GLOO_SOCKET_IFNAME={name} (environment) is kept, but {why}")
    lost = f"would try to connect to {name} and fail. Remove it"
    assert ("would be sent to slow0, in another network. Remove it" if name == "slow0" else lost) in text


@pytest.mark.parametrize("name", ["eth0", "eth0,eth1", "eth1", "fast0"])
def test_an_interface_that_may_be_meant_is_not_warned_about(name: str) -> None:
    # The same network by another card, and a faster network that NODES does not list.
    assert warned(MANY, **ON_TWO, GLOO_SOCKET_IFNAME=name) == ""


TUNNEL = card("tailscale0", "100.64.0.1/32", kind="tunnel")
WIREGUARD = card("wg0", "10.7.0.1/24", kind="tunnel")


@pytest.mark.parametrize(("interface", "address"), [("tailscale0", "100.64.0.1"), ("wg0", "10.7.0.1")])
def test_an_overlays_interface_beside_addresses_of_the_lan_is_told(interface: str, address: str) -> None:
    text = warned(machine(card("eth0", "10.0.0.1/24"), TUNNEL, WIREGUARD), **ON_TWO, GLOO_SOCKET_IFNAME=interface)
    assert text.startswith(f"GLOO_SOCKET_IFNAME={interface} (environment) is kept, but {interface} has {address}, and")


@pytest.mark.parametrize("other", ["100.64.0.2", "10.7.0.2"])
def test_nodes_of_an_overlay_and_of_the_lan_in_one_list_are_told_by_all(other: str) -> None:
    host = machine(card("eth0", "10.0.0.1/24"), TUNNEL, WIREGUARD)
    assert "network.mixed" in warning_ids(host, NODES=f"10.0.0.1,{other}")
    assert "network.mixed" not in warning_ids(host, **ON_TWO)
    assert "network.mixed" not in warning_ids(host, NODES=f"{'100.64.0.1' if '64' in other else '10.7.0.1'},{other}")
    # Who is in the overlay alone may not know its networks, but for those of the shared address space.
    assert "network.mixed" in warning_ids(machine(TUNNEL), NODES="10.0.0.1,100.64.0.1", NODE_RANK="1")


def test_on_one_node_any_interface_serves_and_without_gpus_nobody_reads_nccls() -> None:
    assert warned(MANY, NODES="10.0.0.1", GLOO_SOCKET_IFNAME="lo") == ""
    assert warned(MANY, **ON_TWO, NCCL_SOCKET_IFNAME="=lo") == ""


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("eth", ["eth0", "eth10"]),
        ("=eth0", ["eth0"]),
        ("^eth", ["ib0"]),
        ("^=eth0", ["eth10", "ib0"]),
        ("=eth0:1,ib0:1", ["eth0", "ib0"]),
        ("x", []),
    ],
)
def test_nccls_lists_are_read_as_nccl_reads_them(pattern: str, hits: list[str]) -> None:
    assert matching(pattern, ["eth0", "eth10", "ib0"]) == hits


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("=mlx5_1:2", ["mlx5_1:2"]),
        ("mlx5_1:1", ["mlx5_1:1", "mlx5_11:1"]),
        ("^=mlx5_1", ["mlx5_11:1"]),
        ("=mlx5_1:3", []),
        ("=", ["mlx5_1:1", "mlx5_1:2", "mlx5_11:1"]),
    ],
)
def test_a_port_in_nccls_list_counts_where_names_have_one(pattern: str, hits: list[str]) -> None:
    assert matching(pattern, ["mlx5_1:1", "mlx5_1:2", "mlx5_11:1"]) == hits


def test_an_hca_prefix_that_matches_more_than_it_names_is_told() -> None:
    facts = {"port": 1, "state": "ACTIVE", "link_layer": "InfiniBand", "rate": 1, "lid": 1, "sm_lid": 1}
    host = machine(rdma_ports=tuple(RdmaPort(device=f"mlx5_{index}", **facts) for index in (1, 11)))  # type: ignore[arg-type]  # facts name RdmaPort's fields
    assert "also matches mlx5_11. Write NCCL_IB_HCA==mlx5_1 for exactly that." in warned(host, NCCL_IB_HCA="mlx5_1")
    assert warned(host, NCCL_IB_HCA="=mlx5_1") == ""
    assert "matches no RDMA device or port here (mlx5_1:1, mlx5_11:1)" in warned(host, NCCL_IB_HCA="mlx4")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("NCLL_DEBUG", "NCCL_DEBUG"),
        ("NODERANK", "NODE_RANK"),
        ("NCCL_SOCKET_IF_NAME", "NCCL_SOCKET_IFNAME"),
        ("NPROC_PER_NODES", "NPROC_PER_NODE"),
        ("MASTER_ADDRESS", "MASTER_ADDR"),
        ("OMP_NUM_THREAD", "OMP_NUM_THREADS"),
        ("TORCH_DISTRIBUTED_DEBUGS", "TORCH_DISTRIBUTED_DEBUG"),
        ("nodes", "NODES"),
    ],
)
def test_a_misspelt_variable_is_told_with_what_was_meant(wrong: str, right: str) -> None:
    assert warned(HOST, **{wrong: "1"}) == (
        f"{wrong} (environment) is unknown to NCCL 2.30, Gloo, torch and torchrun-compose. Did you mean {right}?"
    )


def test_known_and_foreign_variables_are_not_taken_for_misspelt_ones() -> None:
    assert {"NCCL_GIN_ENABLE", "NCCL_SHARP_DISABLE", "NCCL_MAX_P2P_NCHANNELS"} <= known_variables()
    # Of a plugin or of a later NCCL, perhaps.
    assert misspelt(given(NCCL_DMA_ENABLE="1", NCCL_IB_ENABLE="1").values) == []
    foreign = "PATH HOME LANG NODE_VERSION NV_LIBNCCL_PACKAGE NVIDIA_VISIBLE_DEVICES HOSTNAME TERM NODE_NAME PYTHONPATH"
    assert misspelt(given(**dict.fromkeys([*foreign.split(), *known_variables()], "1")).values) == []


def test_a_typo_is_told_among_the_problems_if_there_are_any() -> None:
    problems = decide(HOST, NODE_RNAK="1", NNODES="2", MASTER_ADDR="10.0.0.2").problems
    assert [problem.setting for problem in problems] == ["NODE_RANK", "NODE_RNAK"]


def test_stray_torchrun_variables_are_removed_and_named() -> None:
    found = decide(HOST, PET_NNODES="4", PET_STANDALONE="")
    assert found.plan is not None
    assert found.plan.script.removed == ("PET_NNODES", "PET_STANDALONE")
    assert found.warnings[0].id == "settings.stray-pet"
    assert found.warnings[0].texts["strays"] == "PET_NNODES (environment), PET_STANDALONE (environment)"


def test_empty_variables_of_the_libraries_are_removed() -> None:
    plan = planned(HOST, NCCL_IB_GID_INDEX="", NCCL_IB_HCA="", NCCL_DEBUG="", HOME="")
    assert plan.script.removed == ("NCCL_IB_GID_INDEX", "NCCL_IB_HCA")
    assert plan.script.env["NCCL_DEBUG"] == "WARN"
