"""What every vendor's GPUs are to the launcher: facts, and the table of what differs between vendors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    index: int
    name: str = "GPU"
    bus: str = ""
    """PCI address, 0000:18:00.0."""
    pci: tuple[str, ...] = ()
    render: str = ""
    """Name of its device node below /dev/dri, where it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """The GPUs of one vendor; a machine with those of two has the first that gives any."""

    vendor: str = "NVIDIA"
    visible: tuple[Gpu, ...] = ()
    """Those with a device node here, which is what a container has been given."""
    on_bus: tuple[str, ...] = ()
    """PCI addresses of all of the vendor's GPUs in the machine, given or not."""
    driver: str = ""
    runtime: str = ""
    """Highest version of CUDA or ROCm that the driver supports."""
    direct: str = ""
    """How network cards read GPU memory by themselves: a kernel module's name, or `dma-buf`; "" if they do not."""
    unified: bool = False
    """GPU and CPU share one memory (GB10): there is no GPU memory that a card could read directly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHealth:
    index: int
    used: int
    """MiB of memory in use before this job starts."""
    total: int
    uncorrected: int = 0
    """ECC errors since the driver was loaded."""
    slowed: bool = False
    """The hardware holds its clock down: heat or power."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLoad:
    """What a GPU does at this moment; None where it does not tell."""

    index: int
    busy: float | None
    """Share of the last moments in which it computed, 0 to 1."""
    used: int | None
    """Bytes of memory."""
    total: int | None
    temperature: int | None
    """Degrees Celsius."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFault:
    """An error that the driver has logged."""

    bus: str
    name: str
    """`Xid 79`."""
    dead: bool
    """The GPU is not fit until it is reset or replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """Live facts of this node's GPUs."""

    health: tuple[GpuHealth, ...] = ()
    failure: str = ""
    """Why nothing is known of their health; "" if it is, or there is none."""
    iommu: Mapping[str, str] = field(default_factory=dict)
    """By GPU's PCI address: how the IOMMU treats it (`identity`, `DMA`, `DMA-FQ`); absent without IOMMU."""
    apart: tuple[tuple[int, int, str], ...] = ()
    """Pairs that cannot read each other's memory, and why."""
    redirecting: tuple[str, ...] = ()
    """PCI bridges above GPUs that redirect traffic between devices (ACS); only root outside a container sees them."""
    faults: tuple[GpuFault, ...] = ()
    """From the kernel's log; only root outside a container sees it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendor:
    """All that a second vendor has to bring along."""

    name: str
    runtime: str
    """What torch must be built for: CUDA, ROCm."""
    unfit_torch: str
    """Regular expression for versions of torch that are built for something else."""
    device_node: str
    """What a container has that was given a GPU."""
    hardware: str
    """The word of HARDWARE that gives a container its GPUs; with InfiniBand or RoCE, `hardware_rdma`."""
    hardware_rdma: str
    driver: str
    """What must be installed on the machine."""
    masks: tuple[str, ...]
    """Variables that hide GPUs from a process, the first that is set wins."""
    no_direct: str
    """What is missing where network cards cannot read GPU memory by themselves."""
    fix_direct: str
    fixes: Mapping[str, str]
    """Commands by id of doctor's finding; `{gpu}` is an index. "" or absent where there is none."""
    read: Callable[[Path], Gpus]
    """The GPUs of the machine below a root."""
    state: Callable[[Path, Gpus], GpuState]
    """Asks the vendor's tools. Never raises."""
    loads: Callable[[Path, Gpus], tuple[GpuLoad, ...]]
    """What they do at this moment. Never raises."""
    memory: Callable[[Path, Gpus], Mapping[int, int]]
    """MiB in use, by index; without those that tell none. Asked often while a job restarts. Never raises."""
    faults: Callable[[str, float], tuple[GpuFault, ...]]
    """Errors in the kernel's log since a time (seconds since the machine started), each kind once."""
