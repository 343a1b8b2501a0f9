"""NVIDIA GPUs as doctor sees them: by NVML's own Python module, or by the text of nvidia-smi where that is missing."""

import contextlib
import re
from itertools import combinations
from pathlib import Path
from typing import Any

from app.host.accelerators.gpu import GpuFault, GpuHealth, GpuLoad, Gpus, GpuState
from app.host.accelerators.kernel_log import lines_since

SMI_FIELDS = (
    "index",
    "memory.used",
    "memory.total",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
)
LOAD_FIELDS = ("index", "utilization.gpu", "memory.used", "memory.total", "temperature.gpu")
REASONS = {
    "CNS": "the chipset does not support it",
    "GNS": "the GPU does not support it",
    "TNS": "the topology does not support it",
    "DR": "disabled in the driver's settings",
    "NS": "not supported",
    "U": "unknown",
}
"""Legend of `nvidia-smi topo -p2p`, in the order of NVML's nvmlGpuP2PStatus_t from 1 on."""
TEMPERATURE_GPU = 0
"""NVML_TEMPERATURE_GPU."""
P2P_READ = 0
"""NVML_P2P_CAPS_INDEX_READ, which nvidia-ml-py has as the tuple (0,) by mistake (13.615)."""
DEAD_XIDS = frozenset({48, 64, 74, 79, 95, 119, 120, 140})
"""Memory that could not be remapped, NVLink, fallen off the bus, uncontained memory error, firmware that hangs
(NVIDIA: XID errors, the catalogue)."""


def state(root: Path, _gpus: Gpus) -> GpuState:
    if root != Path("/"):
        return GpuState()
    return ask_nvml() or _ask_smi()


def ask_nvml() -> GpuState | None:
    """None where nvidia-ml-py is not installed, or NVML does not answer."""
    try:
        import pynvml as nvml  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        health = tuple(_health(nvml, index, handle) for index, handle in enumerate(handles))
        apart = []
        for (one, first), (other, second) in combinations(enumerate(handles), 2):
            status = _asked(nvml, "nvmlDeviceGetP2PStatus", first, second, P2P_READ)
            if 0 < status <= len(REASONS):
                apart.append((one, other, [*REASONS.values()][status - 1]))
        return GpuState(health=health, apart=tuple(apart))
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def loads(root: Path, _gpus: Gpus) -> tuple[GpuLoad, ...]:
    if root != Path("/"):
        return ()
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # nvidia-ml-py is not installed, or NVML does not answer.
        return read_load(_smi(f"--query-gpu={','.join(LOAD_FIELDS)}", "--format=csv,noheader,nounits")[0])
    try:
        return tuple(_load(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    except nvml.NVMLError:
        return ()
    finally:
        nvml.nvmlShutdown()


def _load(nvml: object, index: int) -> GpuLoad:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)  # type: ignore[attr-defined]
    asked = [("UtilizationRates", ()), ("MemoryInfo", ()), ("Temperature", (TEMPERATURE_GPU,))]
    found = dict[str, Any]()
    for name, arguments in asked:
        # A GPU may not know it: GB10 has no memory of its own.
        with contextlib.suppress(nvml.NVMLError):  # type: ignore[attr-defined]
            found[name] = getattr(nvml, f"nvmlDeviceGet{name}")(handle, *arguments)
    rates, memory, heat = (found.get(name) for name, _ in asked)
    return GpuLoad(
        index=index,
        busy=rates and rates.gpu / 100,
        used=memory and memory.used,
        total=memory and memory.total,
        temperature=heat,
    )


def read_load(output: str) -> tuple[GpuLoad, ...]:
    """The answer to LOAD_FIELDS, one GPU a line."""
    found = []
    for line in output.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == len(LOAD_FIELDS) and words[0].isdigit():
            busy, used, total, heat = (int(word) if word.isdigit() else None for word in words[1:])
            found.append(
                GpuLoad(
                    index=int(words[0]),
                    busy=None if busy is None else busy / 100,
                    used=None if used is None else used << 20,
                    total=None if total is None else total << 20,
                    temperature=heat,
                )
            )
    return tuple(found)


def _health(nvml: object, index: int, handle: object) -> GpuHealth:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)  # type: ignore[attr-defined]
    errors, volatile = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC  # type: ignore[attr-defined]
    reasons = _asked(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    return GpuHealth(
        index=index,
        used=memory.used >> 20,
        total=memory.total >> 20,
        uncorrected=_asked(nvml, "nvmlDeviceGetTotalEccErrors", handle, errors, volatile),
        slowed=bool(reasons & nvml.nvmlClocksThrottleReasonHwSlowdown),  # type: ignore[attr-defined]
    )


def _asked(nvml: object, name: str, *arguments: object) -> int:
    """0 where a GPU does not know the answer: ECC, for instance, on those without."""
    try:
        return int(getattr(nvml, name)(*arguments))
    except nvml.NVMLError:  # type: ignore[attr-defined]
        return 0


def _ask_smi() -> GpuState:
    text, failure = _smi(f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits")
    peers, _ = _smi("topo", "-p2p", "r")
    return GpuState(health=read_health(text), failure=failure, apart=read_peers(peers))


def _smi(*words: str) -> tuple[str, str]:
    # Every start reads this file, and only doctor asks.
    import subprocess

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
    """The pairs of `nvidia-smi topo -p2p r` that are not OK, each once with the reason; () for what is no such
    matrix."""
    rows = {
        int(row[1]): row[2].split() for row in re.finditer(r"^\s*GPU(\d+)((?:\s+[A-Z]+)+)\s*$", output, re.MULTILINE)
    }
    return tuple(
        (one, other, REASONS[word])
        for one, words in rows.items()
        for other, word in enumerate(words)
        if one < other and word in REASONS
    )


def read_xids(log: str, since: float) -> tuple[GpuFault, ...]:
    found = []
    for line in lines_since(log, since):
        error = re.search(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)", line)
        if error:
            found.append(GpuFault(bus=error[1], name=f"Xid {error[2]}", dead=int(error[2]) in DEAD_XIDS))
    return tuple(dict.fromkeys(found))
