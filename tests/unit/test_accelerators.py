"""The vendors' files: NVML by its Python module, AMD's sysfs, what hides GPUs, which torch fits. No GPU was asked."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.config.settings import HARDWARE
from app.host import probe
from app.host.accelerators import VENDORS, read_gpus, read_state, used_memory, vendor_for
from app.host.accelerators.amd import read_resets
from app.host.accelerators.gpu import Gpu, GpuFault, GpuHealth, Gpus
from app.host.accelerators.nvidia_health import ask_nvml
from app.host.limits import Limits
from app.plan import draft
from tests.machines.facts import host_of, settings_of
from tests.machines.library import MACHINES
from tests.machines.tree import Tree, amd_gpu, gpu, hca
from tests.unit.launch_facts import card, decide, machine, planned, reason

NODES = "10.0.0.1,10.0.0.2"


class NvmlError(Exception):
    """Stands for pynvml.NVMLError."""


def fake_nvml(*, fails: str = "") -> SimpleNamespace:
    """nvidia-ml-py as its documentation has it: two GPUs, the second without ECC, which do not read each other."""

    def no_ecc(handle: int, _kind: int, _counter: int) -> int:
        if handle:
            raise NvmlError("Not Supported")
        return 2

    def initialize() -> None:
        if fails:
            raise NvmlError(fails)

    return SimpleNamespace(
        NVMLError=NvmlError,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        NVML_P2P_CAPS_INDEX_READ=(0,),
        nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlInit=initialize,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda _handle: SimpleNamespace(used=31 << 30, total=80 << 30),
        nvmlDeviceGetTotalEccErrors=no_ecc,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 8 if handle else 1,
        nvmlDeviceGetP2PStatus=lambda _one, _other, kind: {0: 1}[kind],
    )


def test_health_and_peers_come_from_nvmls_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    found = ask_nvml()
    assert found is not None
    assert found.health == (
        GpuHealth(index=0, used=31 << 10, total=80 << 10, uncorrected=2, slowed=False),
        GpuHealth(index=1, used=31 << 10, total=80 << 10, uncorrected=0, slowed=True),
    )
    assert found.apart == ((0, 1, "the chipset does not support it"),)


def test_without_the_module_or_with_a_driver_that_refuses_nvidia_smi_is_asked_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert ask_nvml() is None
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(fails="Driver Not Loaded"))
    assert ask_nvml() is None


def test_every_word_of_hardware_is_some_vendors_and_has_its_file() -> None:
    folder = Path(__file__).resolve().parents[2] / "hardware"
    assert {file.stem for file in folder.glob("*.yaml")} - {"shell"} == set(HARDWARE)
    assert vendor_for("rocm").name == "AMD"
    assert {vendor_for(word).name for word in HARDWARE if word != "rocm"} == {"NVIDIA"}


def test_of_amds_gpus_those_that_were_given_count_and_the_processor_does_not(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    amd_gpu(tree, 0, "pci0000:05/0000:05:01.1/0000:06:00.0", passed=False)
    assert (read_gpus(tmp_path).visible, read_gpus(tmp_path).on_bus) == ((), ("0000:06:00.0",))
    amd_gpu(tree, 1, "pci0000:25/0000:25:01.1/0000:26:00.0")
    found = read_gpus(tmp_path)
    assert found.vendor == "AMD"
    assert [(each.index, each.bus, each.render) for each in found.visible] == [(0, "0000:26:00.0", "renderD129")]
    assert found.visible[0].pci == ("pci0000:25", "0000:25:01.1", "0000:26:00.0")
    assert read_state(tmp_path, found).health == (GpuHealth(index=0, used=256, total=192 << 10),)


def test_where_there_are_both_the_vendor_that_gives_a_gpu_is_taken(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    gpu(tree, 0, "pci0000:00/0000:00:05.0", passed=False)
    amd_gpu(tree, 0, "pci0000:25/0000:25:01.1/0000:26:00.0")
    assert read_gpus(tmp_path).vendor == "AMD"


def test_resets_of_amds_driver_are_read_from_the_kernels_log() -> None:
    log = (
        "4,1,100000000,-;amdgpu 0000:26:00.0: amdgpu: GPU reset begin!\n"
        "4,2,101000000,-;amdgpu 0000:26:00.0: amdgpu: GPU reset end with ret = -110, GPU reset failed\n"
    )
    begun = GpuFault(bus="0000:26:00.0", name="GPU reset", dead=False)
    assert begun in read_resets(log, 0.0)
    assert read_resets(log, 200.0) == ()


TWO = Gpus(visible=(Gpu(index=0), Gpu(index=1)))


@pytest.mark.parametrize(("vendor", "name"), [("NVIDIA", "CUDA_VISIBLE_DEVICES"), ("AMD", "ROCR_VISIBLE_DEVICES")])
def test_an_empty_mask_hides_all_gpus(vendor: str, name: str) -> None:
    host = machine(gpus=replace(TWO, vendor=vendor), limits=Limits(cpus=4))
    assert planned(host).workers.backend == "nccl"
    found = decide(host, **{name: ""})
    assert found.plan is not None
    assert (found.plan.workers.gpus, found.plan.workers.backend) == (0, "gloo")
    assert f"{name}= (environment) leaves no GPU" in reason(found, "BACKEND")


@pytest.mark.parametrize(
    ("vendor", "torch", "fits"),
    [
        ("NVIDIA", "2.13.0", True),
        ("NVIDIA", "2.11.0+cu130", True),
        ("NVIDIA", "2.10.0a0+b4e4ee81d3.nv25.12", True),
        ("NVIDIA", "2.13.0+cpu", False),
        ("NVIDIA", "2.9.0+rocm6.4", False),
        ("AMD", "2.9.0+rocm6.4", True),
        ("AMD", "2.8.0a0+gitabc", True),
        ("AMD", "2.13.0", False),
        ("AMD", "2.13.0+cu130", False),
        ("AMD", "2.13.0+cpu", False),
    ],
)
def test_a_torch_that_was_built_for_something_else_is_told(vendor: str, torch: str, fits: bool) -> None:
    host = machine(gpus=replace(TWO, vendor=vendor), limits=Limits(cpus=4, shm=8 << 30), packages={"torch": torch})
    ids = [each.id for each in decide(host).warnings]
    assert ("gpus.torch-without-cuda" in ids) != fits


def test_every_vendor_brings_a_fix_for_each_finding_of_doctor_that_needs_one() -> None:
    for vendor in VENDORS.values():
        assert {"gpu-state-unknown", "gpu-memory-used", "gpu-ecc", "gpu-dead", "gpu-fault"} <= vendor.fixes.keys()


def test_efa_is_used_in_silence_where_its_plugin_is_in_the_image(tmp_path: Path) -> None:
    environ = MACHINES["aws_p5"](tmp_path)
    Tree(tmp_path).write("opt/amazon/ofi-nccl/lib/x86_64-linux-gnu/libnccl-net.so", "")
    settings = settings_of(environ)
    found = draft(settings, host_of(settings, tmp_path))
    assert found.warnings == ()
    assert "plugin, which is here" in reason(found, "EFA ports")


def test_a_card_that_speaks_iwarp_is_not_taken_for_roce(tmp_path: Path) -> None:
    hca(Tree(tmp_path), "i40iw0", "pci0000:15/0000:15:01.0/0000:16:00.0", layer="Ethernet")
    Tree(tmp_path).write("sys/class/infiniband/i40iw0/node_type", "4: RNIC")
    host = machine(card("ens1", "10.0.0.2/24"), rdma_ports=probe(tmp_path).rdma_ports, limits=Limits(cpus=4))
    found = decide(host, NODES=NODES)
    assert found.plan is not None
    assert found.plan.network.transport == "sockets"
    assert any("iWARP" in text for each in found.decisions for text in each.rejected)


def test_what_nccl_reads_from_its_own_file_is_shown_and_what_it_will_not_read_is_told(tmp_path: Path) -> None:
    environ = MACHINES["laptop"](tmp_path)
    lines = "NCCL_NET_GDR_LEVEL=PIX\nNCCL_DEBUG=INFO\n# NCCL_ALGO=Ring\nNCCL_BUFFSIZE=4194304"
    Tree(tmp_path).write("etc/nccl.conf", lines)
    settings = settings_of({**environ, "NCCL_BUFFSIZE": "1"})
    found = draft(settings, host_of(settings, tmp_path))
    shown = {each.name: (each.value, each.source) for each in found.decisions}
    assert shown["NCCL_NET_GDR_LEVEL"] == ("PIX", "/etc/nccl.conf:1")
    assert shown["NCCL_BUFFSIZE"] == ("1", "environment")
    assert "NCCL_ALGO" not in shown
    (warning,) = found.warnings
    assert (warning.id, warning.setting) == ("settings.nccl-conf-overridden", "NCCL_DEBUG")


def test_the_memory_in_use_is_that_of_the_gpus_which_a_mask_leaves(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    for number in range(2):
        amd_gpu(tree, number, f"pci0000:25/0000:25:01.1/0000:2{number}:00.0")
        folder = tmp_path / f"sys/class/drm/renderD{128 + number}/device"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mem_info_vram_used").write_text(str((number + 1) << 30))
    assert used_memory({}, tmp_path) == {0: 1024, 1: 2048}
    assert used_memory({"HIP_VISIBLE_DEVICES": "1"}, tmp_path) == {1: 2048}
    assert used_memory({"CUDA_VISIBLE_DEVICES": "GPU-abc"}, tmp_path) == {0: 1024, 1: 2048}
    assert used_memory({}, tmp_path / "nothing") == {}
