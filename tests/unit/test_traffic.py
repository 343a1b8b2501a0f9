"""Which way the bytes of a training go, by the counters of a made-up machine."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from app.plan import Plan
from app.supervise.traffic import Traffic, alarm, read_traffic, watch, watched
from tests.machines.facts import drafted

GB = 10**9


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two GPUs and an InfiniBand port, between two nodes."""
    found = drafted("classic_b", tmp_path).plan
    assert found is not None
    return found


def count(root: Path, name: str, value: int) -> None:
    file = root / "sys/class" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{value}\n")


def test_the_counters_of_ports_and_of_the_interface_are_read_in_bytes(plan: Plan, tmp_path: Path) -> None:
    count(tmp_path, "infiniband/mlx5_0/ports/1/counters/port_xmit_data", 100)
    count(tmp_path, "infiniband/mlx5_1/ports/1/counters/port_xmit_data", 20)
    count(tmp_path, f"net/{plan.network.interface}/statistics/tx_bytes", 7)
    assert read_traffic(plan, tmp_path) == Traffic(rdma=480, interface=7)


def test_a_training_over_sockets_beside_infiniband_is_an_alarm_once_enough_was_sent(plan: Plan) -> None:
    before = Traffic(rdma=5 * GB, interface=9 * GB)
    assert alarm(plan, before, Traffic(rdma=5 * GB, interface=9 * GB + 500_000_000)) is None
    told = alarm(plan, before, Traffic(rdma=5 * GB, interface=13 * GB))
    assert told is not None
    assert told.startswith(
        f"warning: {plan.network.transport} is here, but NCCL runs over sockets: {plan.network.interface} has sent 4"
    )
    assert alarm(plan, before, Traffic(rdma=50 * GB, interface=10 * GB)) == ""


@pytest.mark.parametrize("counted", [(), ("mlx5_0",)])
def test_ports_that_do_not_count_are_not_watched_and_raise_no_alarm(
    counted: tuple[str, ...], plan: Plan, tmp_path: Path
) -> None:
    for device in ("mlx5_0", "bnxt_re0"):
        count(tmp_path, f"infiniband/{device}/ports/1/rate", 0)
    for device in counted:
        count(tmp_path, f"infiniband/{device}/ports/1/counters/port_xmit_data", 100)
    count(tmp_path, f"net/{plan.network.interface}/statistics/tx_bytes", 7)
    before = read_traffic(plan, tmp_path)
    assert before == Traffic(rdma=None, interface=7)
    assert alarm(plan, before, Traffic(rdma=None, interface=13 * GB)) == ""
    said: list[str] = []
    asyncio.run(asyncio.wait_for(watch(plan, said.append, tmp_path), 1))
    assert said == []


def test_only_a_plan_with_rdma_between_nodes_is_watched(plan: Plan) -> None:
    assert watched(plan)
    for other in (
        replace(plan, network=replace(plan.network, transport="sockets")),
        replace(plan, workers=replace(plan.workers, backend="gloo")),
        replace(plan, nodes=replace(plan.nodes, addresses=plan.nodes.addresses[:1])),
    ):
        assert not watched(other)
