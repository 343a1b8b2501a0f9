"""NCCL's own log read and judged. Texts are from public reports, each with its place; none comes from a GPU of ours."""

from dataclasses import replace

import pytest

from app.doctor.cluster_checks.transport import CollectiveCheck, NcclLog, carrier, judge_transport, read_nccl
from app.doctor.findings import Severity

# https://github.com/NVIDIA/nccl/issues/1925 (NCCL 2.28)
IB_2_28 = """
nccl-sleep-c7d759db6-2bp29:2620971:2620971 [3] NCCL INFO NCCL_IB_DISABLE set by environment to 0.
nccl-sleep-c7d759db6-2bp29:2620971:2620971 [3] NCCL INFO NCCL_IB_HCA set to mlx5_0
nccl-sleep-c7d759db6-2bp29:2620971:2620971 [3] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [RO]; OOB eth0:172.25.30.42<0>
nccl-sleep-c7d759db6-2bp29:2620971:2620971 [3] NCCL INFO Initialized NET plugin IB
nccl-sleep-c7d759db6-2bp29:2620971:2620971 [3] NCCL INFO Assigned NET plugin IB to comm
nccl-sleep-c7d759db6-2bp29:2620971:2620971 [3] NCCL INFO Using network IB
"""
# https://github.com/siderolabs/docs/issues/566
GDR = """
nccl-test:179:179 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [2]mlx5_2:1/IB [3]mlx5_3:1/IB [RO]; OOB eth0:10.0.0.1<0>
nccl-test:179:179 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA
nccl-test:179:179 [0] NCCL INFO Channel 00/0 : 8[0] -> 0[0] [receive] via NET/IB/0/GDRDMA
"""  # noqa: E501 - a real line
# https://github.com/NVIDIA/nccl/issues/1412
WITHOUT_GDR = """
swat1-04:2017630:2017697 [7] NCCL INFO Channel 00/0 : 7[7] -> 6[6] via P2P/direct pointer/read
swat1-04:2017630:2017699 [5] NCCL INFO Channel 03/0 : 5[5] -> 12[4] [send] via NET/IB/3
swat1-04:2017630:2017700 [4] NCCL INFO Channel 03/0 : 13[5] -> 4[4] [receive] via NET/IB/3
"""
# https://github.com/NVIDIA/nccl/issues/707 (bus ids in hexadecimal, before 2.15)
OLD_GDR = """
10-90-43-152:120890:121560 [0] NCCL INFO Channel 01 : 2[c7000] -> 0[87000] [receive] via NET/IB/5/GDRDMA
10-90-43-152:120890:121563 [3] NCCL INFO Channel 01 : 3[ca000] -> 2[c7000] [send] via NET/IB/2/GDRDMA
"""
# https://github.com/NVIDIA/nccl/issues/1267
FALLBACK = """
NCCL version 2.19.3+cuda12.3
instance-8g-96c-2:525781:525957 [0] NCCL INFO NET/IB : No device found.
instance-8g-96c-2:525781:525957 [0] NCCL INFO NET/Socket : Using [0]ens7:10.128.0.31<0>
instance-8g-96c-2:525781:525957 [0] NCCL INFO Using non-device net plugin version 0
instance-8g-96c-2:525781:525957 [0] NCCL INFO Using network Socket
"""
# https://github.com/NVIDIA/nccl-tests/issues/188
TWO_SOCKETS = """
user:852750:852802 [0] NCCL INFO NCCL_IB_DISABLE set by environment to 1.
user:852750:852802 [0] NCCL INFO NET/Socket : Using [0]ibs85f0:192.168.1.14<0> [1]ib0:192.168.1.15<0>
user:852750:852802 [0] NCCL INFO Using network Socket
"""
# https://github.com/NVIDIA/nccl-tests/issues/185
ROCE = """
dgxh100-4:460770:460842 [0] NCCL INFO NET/IB : Using [0]mlx5_10:1/RoCE [1]mlx5_11:1/RoCE [RO]; OOB enp220s0np0:11.1.128.136<0>
dgxh100-4:460770:460842 [0] NCCL INFO Using network IB
"""  # noqa: E501 - a real line
# https://github.com/NVIDIA/nccl/issues/1357 and 1814 (NVIDIA's HPC-X plugin)
PLUGIN = """
qh100-gpu19:49357:49418 [3] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB/SHARP [1]mlx5_1:1/IB/SHARP [RO]; OOB ibp25s0:10.20.0.119<0>
qh100-gpu19:49357:49418 [3] NCCL INFO Using network IBext
hostname-test:987:1260 [7] NCCL INFO Channel 03/0 : 47[7] -> 39[7] [receive] via NET/IBext_v8/2
"""  # noqa: E501 - a real line
# https://github.com/NVIDIA/nccl/issues/367 (2.7)
OLD_SOCKET = "c6ad99331184:117277:117384 [0] NCCL INFO Ring 00 : 15 -> 0 [receive] via NET/Socket/0\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (IB_2_28, NcclLog(network="IB", devices=("mlx5_0:1/IB",))),
        (
            GDR,
            NcclLog(
                network="IB",
                devices=("mlx5_0:1/IB", "mlx5_1:1/IB", "mlx5_2:1/IB", "mlx5_3:1/IB"),
                channels=2,
                direct=2,
            ),
        ),
        (WITHOUT_GDR, NcclLog(network="IB", inside=("P2P",), channels=2)),
        (OLD_GDR, NcclLog(network="IB", channels=2, direct=2)),
        (FALLBACK, NcclLog(network="Socket", devices=("ens7:10.128.0.31<0>",), version="2.19.3")),
        (TWO_SOCKETS, NcclLog(network="Socket", devices=("ibs85f0:192.168.1.14<0>", "ib0:192.168.1.15<0>"))),
        (ROCE, NcclLog(network="IB", devices=("mlx5_10:1/RoCE", "mlx5_11:1/RoCE"))),
        (PLUGIN, NcclLog(network="IBext_v8", devices=("mlx5_0:1/IB/SHARP", "mlx5_1:1/IB/SHARP"), channels=1)),
        (OLD_SOCKET, NcclLog(network="Socket", channels=1)),
        ("no line of NCCL", NcclLog()),
    ],
)
def test_what_nccl_chose_is_read_from_its_log(text: str, expected: NcclLog) -> None:
    assert read_nccl(text) == expected


WELL = CollectiveCheck(
    backend="nccl",
    ranks=16,
    bus_bandwidth=40e9,
    interface="eth0",
    transport="InfiniBand",
    expects_direct=True,
    active_ports=8,
    log=read_nccl(GDR),
)


def test_infiniband_with_gpudirect_is_green_and_names_its_cards() -> None:
    finding = judge_transport(WELL)
    assert finding.severity == Severity.GREEN
    assert "IB (mlx5_0:1/IB" in finding.sentence
    assert "2 of 2 channels with GPUDirect" in finding.sentence


def test_sockets_on_a_machine_with_infiniband_are_red() -> None:
    finding = judge_transport(replace(WELL, log=read_nccl(FALLBACK)))
    assert finding.severity == Severity.RED
    assert finding.sentence.startswith("InfiniBand is here (8 active ports) but NCCL runs over sockets (ens7:")


def test_sockets_are_right_where_there_is_nothing_else() -> None:
    plain = replace(WELL, transport="sockets", active_ports=0, expects_direct=False, log=read_nccl(FALLBACK))
    assert judge_transport(replace(plain, carrier="eth0")).severity == Severity.GREEN


def test_infiniband_through_the_cpus_memory_is_yellow_where_it_could_be_direct() -> None:
    assert judge_transport(replace(WELL, log=read_nccl(WITHOUT_GDR))).severity == Severity.YELLOW
    assert judge_transport(replace(WELL, log=read_nccl(WITHOUT_GDR), expects_direct=False)).severity == Severity.GREEN


def test_a_collective_over_another_interface_than_planned_is_told() -> None:
    gloo = CollectiveCheck(backend="gloo", ranks=2, interface="eth0", carrier="docker0")
    finding = judge_transport(gloo)
    assert finding.severity == Severity.YELLOW
    assert "went over docker0, not over eth0" in finding.sentence


def test_a_failed_collective_is_red_with_its_reason() -> None:
    finding = judge_transport(CollectiveCheck(failure="Connection refused"))
    assert (finding.severity, "Connection refused" in finding.sentence) == (Severity.RED, True)


def test_the_carrier_is_the_interface_that_moved_the_payload() -> None:
    before, after = {"eth0": 100, "lo": 0, "docker0": 5}, {"eth0": 5000, "lo": 10, "docker0": 5}
    assert carrier(before, after, 1000) == "eth0"
    assert carrier(before, after, 10_000) == ""
    assert carrier({}, {}, 1) == ""


def test_on_one_node_no_network_is_judged_and_the_way_between_its_gpus_is_told() -> None:
    # NCCL names the network that it would use although nothing goes over it.
    log = NcclLog(network="Socket", inside=("P2P",))
    finding = judge_transport(
        CollectiveCheck(backend="nccl", ranks=8, alone=True, active_ports=8, interface="eth0", log=log)
    )
    assert finding.severity == Severity.GREEN
    assert finding.sentence.endswith("inside this machine: GPUs read each other's memory (P2P)")
    assert read_nccl("a:1:2 [0] NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct/direct\n").inside == ("SHM",)
