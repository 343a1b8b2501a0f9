"""GPUs as doctor sees them: health, how they reach each other, and what keeps them from it."""

import contextlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.host import Host
from app.host.accelerators.xids import kernel_log, read_xids
from app.host.files import text

SMI_FIELDS = (
    "index",
    "memory.used",
    "memory.total",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
)
REASONS = {
    "CNS": "the chipset does not support it",
    "GNS": "the GPU does not support it",
    "TNS": "the topology does not support it",
    "NS": "not supported",
    "DR": "disabled in the driver's settings",
    "U": "unknown",
}
"""Legend of `nvidia-smi topo -p2p`."""
ACS, ACS_REDIRECT = 0x000D, 0b1100
"""PCI Express: the extended capability Access Control Services, and in its control register the bits that send requests
and completions between devices up to the root instead (lspci shows ReqRedir+ and CmpltRedir+)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHealth:
    index: int
    used: int
    """MiB of memory in use before this job starts."""
    total: int
    uncorrected: int
    """ECC errors since the driver was loaded."""
    slowed: bool
    """The hardware holds its clock down: heat or power."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLook:
    """Live facts of this node's GPUs."""

    health: tuple[GpuHealth, ...] = ()
    failure: str = ""
    """Why nothing is known of their health; "" if it is, or there is none."""
    iommu: Mapping[str, str] = field(default_factory=dict)
    """By GPU's PCI address: how the IOMMU treats it (`identity`, `DMA`, `DMA-FQ`); absent without IOMMU."""
    apart: tuple[tuple[int, int, str], ...] = ()
    """Pairs that cannot read each other's memory, with the word of `nvidia-smi topo -p2p r`."""
    redirecting: tuple[str, ...] = ()
    """PCI bridges above GPUs that redirect traffic between devices (ACS); only root outside a container sees them."""
    xids: tuple[tuple[str, int], ...] = ()
    """(PCI address, Xid) of the driver's errors in the kernel's log; only root outside a container sees it."""


def look_at_gpus(root: Path, host: Host) -> GpuLook:
    """Looks below `root`, and asks nvidia-smi on the machine itself. Never raises."""
    if not host.gpus.visible:
        return GpuLook()
    smi, failure, peers = "", "", ""
    if root == Path("/"):
        smi, failure = _ask(f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits")
        peers, _ = _ask("topo", "-p2p", "r")
    bridges = {bridge for gpu in host.gpus.visible for bridge in gpu.pci[:-1]}
    return GpuLook(
        health=read_health(smi),
        failure=failure,
        iommu=_iommu(root, [gpu.bus for gpu in host.gpus.visible if gpu.bus]),
        apart=read_peers(peers),
        redirecting=tuple(sorted(bridge for bridge in bridges if _redirects(root, bridge))),
        xids=read_xids(kernel_log(root / "dev/kmsg")),
    )


def _ask(*words: str) -> tuple[str, str]:
    try:
        done = subprocess.run(["nvidia-smi", *words], check=False, capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        return "", "nvidia-smi is not here"
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi: {type(error).__name__}"
    if done.returncode:
        return "", f"nvidia-smi: {(done.stdout + done.stderr).strip().partition(chr(10))[0][:200]}"
    return done.stdout, ""


def read_health(output: str) -> tuple[GpuHealth, ...]:
    """The answer to SMI_FIELDS, one GPU a line; `[N/A]` and whatever else is no number counts as 0."""
    found = []
    for line in output.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == len(SMI_FIELDS):
            index, used, total, uncorrected = (int(word) if word.isdigit() else 0 for word in words[:4])
            slowed = words[4] == "Active"
            found.append(GpuHealth(index=index, used=used, total=total, uncorrected=uncorrected, slowed=slowed))
    return tuple(found)


def read_peers(output: str) -> tuple[tuple[int, int, str], ...]:
    """The pairs of `nvidia-smi topo -p2p r` that are not OK, each once; () for what is no such matrix."""
    rows = {
        int(row[1]): row[2].split() for row in re.finditer(r"^\s*GPU(\d+)((?:\s+[A-Z]+)+)\s*$", output, re.MULTILINE)
    }
    return tuple(
        (one, other, word)
        for one, words in rows.items()
        for other, word in enumerate(words)
        if one < other and word in REASONS
    )


def _iommu(root: Path, buses: Sequence[str]) -> dict[str, str]:
    found = {}
    for bus in buses:
        with contextlib.suppress(OSError):
            kind = text(root / "sys/bus/pci/devices" / bus.lower() / "iommu_group" / "type")
            if kind:
                found[bus] = kind
    return found


def _redirects(root: Path, bridge: str) -> bool:
    try:
        config = (root / "sys/bus/pci/devices" / bridge / "config").read_bytes()
    except OSError:
        return False
    offset = 0x100
    for _ in range(48):
        header = int.from_bytes(config[offset : offset + 4], "little")
        if header & 0xFFFF == ACS:
            return bool(int.from_bytes(config[offset + 6 : offset + 8], "little") & ACS_REDIRECT)
        offset = header >> 20
        if offset < 0x100:
            break
    return False
