"""Facts: read from this machine as it is, and below made-up roots."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from socket import AF_INET, AF_INET6

import pytest

from app.host import probe
from app.host.accelerators.nvidia import nvml_facts, nvml_memory, read_gpus
from app.host.addresses import canonical, parse
from app.host.files import natural, number, pci_path
from app.host.limits import read_limits
from app.host.names import resolve_names
from app.host.nics import read_nics, read_routes, routed_by
from app.host.paths import importable, look_at
from app.host.rdma import read_rdma_ports
from tests.machines.tree import Tree, finish, gpu, hca, nic, roce_gids


def test_this_machine_is_read_as_it_is() -> None:
    host = probe(resolve=["localhost", "no-such-name.invalid"], paths=[__file__, "/no/such/file", "/"])
    loopback = next(each for each in host.nics if each.name == "lo")
    assert loopback.kind == "loopback"
    assert "127.0.0.1" in [address.text for address in loopback.addresses]
    assert host.uid == os.geteuid()
    assert host.limits.cpus <= len(os.sched_getaffinity(0))
    assert host.packages["torch"]
    assert "127.0.0.1" in host.answers["localhost"].addresses
    assert host.answers["no-such-name.invalid"].failure
    assert host.files["/no/such/file"].kind == "missing"
    assert host.files["/"].kind == "folder"
    assert len(host.files[__file__].digest) == 12


def test_what_lies_at_a_path_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" secret \n")
    os.mkfifo(tmp_path / "pipe")
    seen = {name: look_at(Path("/"), str(tmp_path / name)) for name in ("token", "token/x", "pipe", "a/b", "", "\0")}
    kinds = {"token": "file", "token/x": "missing", "pipe": "file", "a/b": "missing", "": "folder", "\0": "unreadable"}
    assert {name: each.kind for name, each in seen.items()} == kinds
    assert seen["token"].size == 6
    assert seen["token/x"].obstacle == str(tmp_path / "token")
    assert seen["a/b"].obstacle == ""


def test_a_folder_without_permission_stands_in_the_way_of_what_is_below(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o555)
    script = "import sys; from pathlib import Path; from app.host.paths import look_at; "
    script += "print(look_at(Path('/'), sys.argv[1]).obstacle)"
    # Root may write everywhere; without this capability it is a user like others.
    like_a_user = ("setpriv", "--bounding-set=-dac_override") if os.geteuid() == 0 else ()
    command = [*like_a_user, sys.executable, "-c", script, str(tmp_path / "theirs/runs/x")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("module", "found"),
    [("pkg.mod", True), ("single", True), ("namespace.x", True), ("no.such", False), ("a/b", False)],
)
def test_a_module_is_found_by_its_first_part_where_python_looks(module: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    (tmp_path / "single.py").touch()
    (tmp_path / "namespace").mkdir()
    assert importable(module, f"/nowhere:{tmp_path}") is found
    assert importable("json.tool", "")
    assert importable("", "") is False


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("[2001:DB8:0:0::1]", "2001:db8::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("name", "name"),
        ("010.0.0.1", "010.0.0.1"),
    ],
)
def test_an_address_has_one_form(text: str, form: str) -> None:
    assert canonical(text) == form
    assert (parse(text) is None) == ((form == text and not form[0].isdigit()) or form == "010.0.0.1")


def test_names_are_sorted_as_people_do() -> None:
    assert sorted(["mlx5_10", "mlx5_2", "mlx5_bond_0"], key=natural) == ["mlx5_2", "mlx5_10", "mlx5_bond_0"]


def test_an_unreadable_number_is_none(tmp_path: Path) -> None:
    (tmp_path / "speed").write_text("unknown\n")
    assert number(tmp_path / "speed") is None
    assert number(tmp_path / "absent") is None
    assert number(tmp_path) is None


def test_what_is_no_pci_device_has_no_pci_path(tmp_path: Path) -> None:
    assert pci_path(tmp_path) == ()
    assert pci_path(tmp_path / "absent") == ()


def test_the_kernel_tells_the_same_addresses_as_it_tells_psutil() -> None:
    import psutil

    found = {nic.name: {(each.text, each.prefix) for each in nic.addresses} for nic in read_nics(Path("/"))}
    for name, addresses in psutil.net_if_addrs().items():
        ours = {text for text, _ in found[name.partition(":")[0]]}
        assert {canonical(each.address) for each in addresses if each.family in (AF_INET, AF_INET6)} <= ours
    assert {("127.0.0.1", 8)} <= found["lo"]


def test_interfaces_of_each_kind_are_told_apart(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    for name, devtype in (
        ("br0", "bridge"),
        ("wg0", "wireguard"),
        ("vx0", "vxlan"),
        ("eth0.5", "vlan"),
        ("bond0", "bond"),
    ):
        nic(tree, name, devtype=devtype)
    nic(tree, "eth0", pci="pci0000:00/0000:00:04.0")
    nic(tree, "dummy0")
    nic(tree, "tun0")
    tree.write("sys/devices/virtual/net/tun0/tun_flags", "0x1001")
    for name in ("docker0", "br-0123456789ab", "vethab12", "virbr0", "cni0", "flannel.1", "cali123"):
        nic(tree, name)
    nic(tree, "ib0", kind=32)
    finish(tree)
    kinds = {each.name: each.kind for each in read_nics(tmp_path)}
    container = ("docker0", "br-0123456789ab", "vethab12", "virbr0", "cni0", "flannel.1", "cali123")
    assert {name for name, kind in kinds.items() if kind == "container"} == set(container)
    others = {name: kind for name, kind in kinds.items() if kind != "container"}
    assert others == {
        "br0": "bridge",
        "wg0": "tunnel",
        "vx0": "tunnel",
        "tun0": "tunnel",
        "eth0.5": "vlan",
        "bond0": "bond",
        "eth0": "ethernet",
        "dummy0": "virtual",
        "ib0": "infiniband",
    }


ROUTES = """Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	0100000A	0003	0	0	100	00000000	0	0	0
eth1	0000090A	00000000	0001	0	0	0	0000FFFF	0	0	0
eth2	00000000	0100000A	0003	0	0	50	00000000	0	0	0"""
NO_SOURCE = f"{'0' * 32} 00 {'0' * 32} 00000100 00000001 00000000 00000001"
ROUTES6 = f"""20010db80009{"0" * 20} 40 {NO_SOURCE}     eth1
fe80{"0" * 28} 40 {NO_SOURCE}     eth0"""


@pytest.mark.parametrize(
    ("target", "interface"),
    [("10.9.1.2", "eth1"), ("10.8.1.2", "eth2"), ("2001:db8:9::1", "eth1"), ("2001:db8:8::1", None)],
)
def test_the_route_is_the_longest_prefix_then_the_lowest_metric(
    target: str, interface: str | None, tmp_path: Path
) -> None:
    tree = Tree(tmp_path)
    tree.write("proc/net/route", ROUTES)
    tree.write("proc/net/ipv6_route", ROUTES6)
    address = parse(target)
    assert address is not None
    assert routed_by(read_routes(tmp_path), address) == interface


def limits_of(tmp_path: Path, cgroup: str, **files: str) -> tuple[int, int | None]:
    tree = Tree(tmp_path)
    tree.write("proc/self/status", "Cpus_allowed_list:\t0-3,8-11")
    tree.write("proc/self/cgroup", cgroup)
    for path, content in files.items():
        tree.write(f"sys/fs/cgroup/{path.replace('__', '/').replace('_DOT_', '.')}", content)
    found = read_limits(tmp_path)
    return found.cpus, found.memory


def test_limits_of_control_groups_version_2_hold_from_every_level(tmp_path: Path) -> None:
    files = {"cpu_DOT_max": "300000 100000", "user__cpu_DOT_max": "250000 100000", "user__memory_DOT_max": "max"}
    assert limits_of(tmp_path, "0::/user", **files, memory_DOT_max="1024") == (3, 1024)


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    cgroup = "3:cpu:/docker/abc\n2:memory:/docker/abc"
    files = {"cpu__cpu_DOT_cfs_quota_us": "150000", "cpu__cpu_DOT_cfs_period_us": "100000"}
    assert limits_of(tmp_path, cgroup, **files, memory__memory_DOT_limit_in_bytes="4096") == (2, 4096)


def test_without_limits_the_affinity_counts(tmp_path: Path) -> None:
    unlimited = {"memory__memory_DOT_limit_in_bytes": "9223372036854771712", "cpu__cpu_DOT_cfs_quota_us": "-1"}
    assert limits_of(tmp_path, "3:cpu:/\n2:memory:/", **unlimited) == (8, None)


def test_the_limit_of_open_files_is_the_hard_one_to_which_the_launcher_raises_its_own(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write("proc/self/limits", "Max open files            1024                 524288               files")
    assert read_limits(tmp_path).open_files == 524288


def test_gpus_on_the_bus_that_were_not_passed_in_are_seen(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    gpu(tree, 0, "pci0000:00/0000:00:04.0", passed=False)
    gpu(tree, 1, "pci0000:00/0000:00:05.0", model="NVIDIA L4")
    tree.write("dev/nvidiactl", "")
    found = read_gpus(tmp_path)
    assert found.on_bus == ("0000:00:04.0", "0000:00:05.0")
    assert [(each.index, each.name, each.bus) for each in found.visible] == [(0, "NVIDIA L4", "0000:00:05.0")]
    assert found.driver == "580.82.07"


def test_only_the_slots_in_use_of_a_gid_table_are_read(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    gids = roce_gids("a288:c2ff:fe3b:506a", "10.200.1.10", "ens10np0")
    hca(tree, "mlx5_6", "pci0000:15/0000:15:01.0/0000:16:00.0", layer="Ethernet", gids=gids, number=6)
    (port,) = read_rdma_ports(tmp_path)
    assert [(gid.index, gid.kind, canonical(gid.text)) for gid in port.gids] == [
        (0, "IB/RoCE v1", "fe80::a288:c2ff:fe3b:506a"),
        (1, "RoCE v2", "fe80::a288:c2ff:fe3b:506a"),
        (2, "IB/RoCE v1", "10.200.1.10"),
        (3, "RoCE v2", "10.200.1.10"),
    ]
    assert (port.name, port.state, port.rate, port.uverbs) == ("mlx5_6:1", "ACTIVE", 400.0, "uverbs6")
    assert port.openable
    assert port.netdevs == ("ens10np0",)


class FakeNvml:
    """Stands for libnvidia-ml, which needs a GPU's driver."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def nvmlInit_v2(self) -> int:  # noqa: N802 - NVML's name
        return self.status

    def nvmlSystemGetCudaDriverVersion_v2(self, version: object) -> int:  # noqa: N802 - NVML's name
        ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = 13020  # type: ignore[arg-type]  # byref's result has no public type
        return 0

    def nvmlDeviceGetCount_v2(self, count: object) -> int:  # noqa: N802 - NVML's name
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))[0] = 2  # type: ignore[arg-type]  # as above
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: object) -> int:  # noqa: N802 - NVML's name
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = index + 1  # type: ignore[arg-type]  # as above
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: object) -> int:  # noqa: N802 - NVML's name
        memory[:] = [80 << 30, 49 << 30, (handle.value or 0) << 30]  # type: ignore[index]  # as above
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802 - NVML's name
        return 0


def test_nvml_tells_the_memory_in_use_of_each_gpu() -> None:
    assert nvml_memory(FakeNvml()) == {0: 1024, 1: 2048}  # type: ignore[arg-type]  # a stand-in for the loaded library
    assert nvml_memory(FakeNvml(status=9)) == nvml_memory(None) == {}  # type: ignore[arg-type]  # as above


def test_nvml_tells_the_cuda_version_and_its_absence_is_fine() -> None:
    assert nvml_facts(FakeNvml()) == ("13.2", 2)  # type: ignore[arg-type]  # a stand-in for the loaded library
    assert nvml_facts(FakeNvml(status=9)) == ("", 0)  # type: ignore[arg-type]  # as above
    assert nvml_facts(None) == ("", 0)


def test_names_are_looked_up_side_by_side() -> None:
    found = resolve_names(["localhost", "127.0.0.1", "no-such-name.invalid"])
    assert found["127.0.0.1"].addresses == ("127.0.0.1",)
    assert found["no-such-name.invalid"].addresses == ()


def test_waiting_for_a_name_is_bounded_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import threading

    from app.host import names

    never = threading.Event()
    monkeypatch.setattr(names, "SILENCE", 0.01)
    monkeypatch.setattr(names, "DEADLINE", 0.05)
    monkeypatch.setattr(names, "_lookup", lambda _name, _answers: never.wait(30))
    found = resolve_names(["slow"])
    never.set()
    assert found["slow"].failure == "no answer from the name server within 0 s"
    assert "waiting for the address of slow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "ids", "inside"),
    [
        ("6.12.48+deb13-amd64", "0 0 4294967295", ""),
        ("6.6.87.2-microsoft-standard-WSL2", "0 0 4294967295", "wsl"),
        ("6.10.14-linuxkit", "0 0 4294967295", "desktop"),
        ("6.8.0-71-generic", "0 1000 1\n1 100000 65536", "rootless"),
    ],
)
def test_what_stands_before_the_machines_network_is_seen(tmp_path: Path, kernel: str, ids: str, inside: str) -> None:
    for path, content in (("proc/sys/kernel/osrelease", kernel), ("proc/self/uid_map", ids), (".dockerenv", "")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    assert probe(tmp_path).inside == inside
