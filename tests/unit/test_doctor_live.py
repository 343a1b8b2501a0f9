"""Doctor's own live facts, read from made-up kernel files and from this machine's own disk."""

import socket
import threading
from pathlib import Path

import pytest

from app.doctor.collect.live import CheckpointDisk, collect, probe_disk
from app.host import Host, probe
from app.host.accelerators import ACS
from app.host.accelerators.gpu import GpuFault, GpuHealth
from app.host.accelerators.nvidia_health import read_health, read_peers, read_xids
from tests.machines.library import MACHINES

TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:72D8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0100007F:A1B2 0100007F:72D8 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
"""
TCP6 = """  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:72D9 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: B80D0120000007000000000002000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000
"""


def write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


def test_counters_are_read_and_zeros_left_out(tmp_path: Path) -> None:
    MACHINES["dgx_h100"](tmp_path)
    nic, port = tmp_path / "sys/class/net/ens6f0np0", tmp_path / "sys/class/infiniband/mlx5_4/ports/1"
    for name, count in {"rx_errors": 0, "rx_crc_errors": 7, "rx_packets": 50, "tx_packets": 60}.items():
        write(nic / "statistics" / name, f"{count}\n")
    write(nic / "duplex", "full\n")
    write(nic / "carrier_down_count", "12\n")
    write(port / "counters/symbol_error", "99\n")
    write(port / "counters/link_downed", "0\n")
    write(port / "hw_counters/local_ack_timeout_err", "5\n")
    found = collect(tmp_path, probe(tmp_path), None)
    health = found.nics["ens6f0np0"]
    assert (health.duplex, health.packets, health.errors, health.flaps) == ("full", 110, {"rx_crc_errors": 7}, 12)
    assert found.rdma["mlx5_4:1"] == {"symbol_error": 99, "local_ack_timeout_err": 5}
    assert "lo" not in found.nics


def test_only_listening_sockets_count_and_addresses_are_read_in_the_kernels_byte_order(tmp_path: Path) -> None:
    write(tmp_path / "proc/net/tcp", TCP)
    write(tmp_path / "proc/net/tcp6", TCP6)
    assert collect(tmp_path, Host(), None).listening == {
        ("127.0.0.1", 29400),
        ("0.0.0.0", 22),
        ("::", 29401),
        ("2001:db8:7::2", 8080),
    }


def test_a_listener_of_this_machine_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert ("127.0.0.1", server.getsockname()[1]) in collect(Path("/"), Host(), None).listening


def test_an_empty_machine_tells_nothing_and_raises_nothing(tmp_path: Path) -> None:
    found = collect(tmp_path, Host(), None)
    assert (found.nics, found.rdma, found.disk, found.listening, found.clock_source) == ({}, {}, None, frozenset(), "")


def test_the_disk_below_a_folder_that_is_not_made_yet_is_measured_and_left_clean(tmp_path: Path) -> None:
    disk = probe_disk(tmp_path / "runs/default/checkpoints")
    assert (disk.folder, disk.failure) == (str(tmp_path), "")
    assert disk.speed
    assert 0 < disk.free <= disk.total
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_to_be_written_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_where: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.doctor.collect.live.tempfile.TemporaryFile", refuse)
    disk = probe_disk(tmp_path)
    assert disk == CheckpointDisk(
        folder=str(tmp_path),
        free=disk.free,
        total=disk.total,
        inodes=disk.inodes,
        speed=None,
        failure="No space left on device",
    )


def test_a_checkpoint_folder_below_one_that_may_not_be_entered_is_told_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Root, who runs these tests in a container, may enter every folder.
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)
    folder = tmp_path / "of another user/checkpoints"
    assert probe_disk(folder) == CheckpointDisk(folder=str(folder), failure="Permission denied")


def test_a_file_system_that_does_not_answer_does_not_hold_up_doctor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    never = threading.Event()
    monkeypatch.setattr("app.doctor.collect.live.STAT_LIMIT", 0.05)
    monkeypatch.setattr("app.doctor.collect.live.os.statvfs", lambda _place: never.wait(20))
    try:
        assert probe_disk(tmp_path).failure.startswith("no answer within")
    finally:
        never.set()


def test_a_write_that_hangs_does_not_hold_up_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    never = threading.Event()
    monkeypatch.setattr("app.doctor.collect.live.PROBE_LIMIT", 0.05)
    monkeypatch.setattr("app.doctor.collect.live.os.fsync", lambda _descriptor: never.wait(20))
    try:
        assert probe_disk(tmp_path).speed is None
    finally:
        never.set()


def test_the_answer_of_nvidia_smi_is_read_and_what_a_card_does_not_have_is_0() -> None:
    # Format of `nvidia-smi --query-gpu --format=csv,noheader,nounits`; no GPU was asked for this text.
    output = "0, 31023, 81559, 0, Not Active\n1, 4, 15360, [N/A], Active\nno such line\n"
    assert read_health(output) == (
        GpuHealth(index=0, used=31023, total=81559, uncorrected=0, slowed=False),
        GpuHealth(index=1, used=4, total=15360, uncorrected=0, slowed=True),
    )


def test_how_the_iommu_treats_a_gpu_is_read(tmp_path: Path) -> None:
    MACHINES["classic_a"](tmp_path)
    host = probe(tmp_path)
    write(tmp_path / "sys/bus/pci/devices/0000:43:00.0/iommu_group/type", "DMA-FQ\n")
    assert collect(tmp_path, host, None).gpus.iommu == {"0000:43:00.0": "DMA-FQ"}


def test_pairs_of_gpus_that_do_not_reach_each_other_are_read() -> None:
    # `nvidia-smi topo -p2p r` as users post it; no GPU was asked for this text.
    matrix = """ \tGPU0\tGPU1\tGPU2\t
 GPU0\tX\tOK\tCNS\t
 GPU1\tOK\tX\tGNS\t
 GPU2\tCNS\tGNS\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
"""
    assert read_peers(matrix) == (
        (0, 2, "the chipset does not support it"),
        (1, 2, "the GPU does not support it"),
    )
    assert read_peers("No devices were found\n") == ()


def test_errors_of_the_driver_are_read_from_the_kernels_log(tmp_path: Path) -> None:
    MACHINES["classic_a"](tmp_path)
    log = (
        "4,1201,74889644132,-;NVRM: Xid (PCI:0000:43:00): 79, GPU has fallen off the bus.\n"
        "4,1202,74889644133,-;NVRM: Xid (PCI:0000:43:00): 79, GPU has fallen off the bus.\n"
        "6,1203,74889644134,-;eth0: link up\n"
    )
    write(tmp_path / "dev/kmsg", log)
    dead = GpuFault(bus="0000:43:00", name="Xid 79", dead=True)
    assert collect(tmp_path, probe(tmp_path), None).gpus.faults == (dead,)
    assert read_xids("", since=0.0) == ()
    assert read_xids(log, since=74889.0) == (dead,)
    assert read_xids(log, since=74890.0) == ()


@pytest.mark.parametrize(("control", "redirects"), [(0x001D, True), (0x0001, False)])
def test_a_bridge_above_a_gpu_that_redirects_traffic_is_found(tmp_path: Path, control: int, redirects: bool) -> None:
    MACHINES["classic_a"](tmp_path)
    host = probe(tmp_path)
    bridge = host.gpus.visible[0].pci[1]
    config = bytearray(4096)
    config[0x100:0x104] = (0x0001 | 0x148 << 20).to_bytes(4, "little")  # error reporting comes first
    config[0x148:0x14C] = ACS.to_bytes(4, "little")
    config[0x14E:0x150] = control.to_bytes(2, "little")
    (tmp_path / "sys/bus/pci/devices" / bridge).mkdir(parents=True, exist_ok=True)
    (tmp_path / "sys/bus/pci/devices" / bridge / "config").write_bytes(config)
    assert collect(tmp_path, host, None).gpus.redirecting == ((bridge,) if redirects else ())
