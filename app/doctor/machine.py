"""Checks of this node besides its network: GPUs, limits, disk, clock."""

from collections.abc import Iterator

from app.doctor.engine import COMMANDS
from app.doctor.facts import Facts
from app.doctor.findings import Finding, Level, green, skipped
from app.host.accelerators.health import REASONS, GpuHealth, GpuLook

FREE_RED, FREE_YELLOW = 1 << 30, 10 << 30
FEW_INODES = 1000
SLOW_DISK = 20e6
"""Bytes per second: a checkpoint of 1 GB takes a minute."""
GPU_MEMORY_USED = 1024
"""MiB; the driver itself takes a few hundred."""
DEAD_XIDS = frozenset({48, 64, 74, 79, 95, 119, 120, 140})
"""Memory that could not be remapped, NVLink, fallen off the bus, uncontained memory error, firmware that hangs
(NVIDIA: XID errors, the catalogue): the GPU is not fit until it is reset or replaced."""
XID_CURES = {
    Level.RED: "sudo nvidia-smi -r, or start the machine anew; if it comes again, have the GPU replaced",
    Level.YELLOW: "look the number up in NVIDIA's Xid table: many are a fault of the program that ran",
}
MANY_XIDS = 8
OLDEST_COMPOSE = (2, 24)
"""compose.yaml uses `env_file: required: false`."""
SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies")

Told = tuple[Level, str, str]
"""How bad, the sentence, the cure."""


def check_gpus(facts: Facts) -> tuple[Finding, ...]:
    """Their health, and how they reach each other."""
    if not facts.host.gpus.visible:
        return (skipped("gpus", "no GPU here: workers run on the CPU"),)
    seen = facts.look.gpus
    told = [each for gpu in seen.health for each in _gpu_health(gpu)]
    if len(facts.host.gpus.visible) > 1:
        told += _gpu_peers(seen)
    for bus, number in seen.xids[:MANY_XIDS]:
        level = Level.RED if number in DEAD_XIDS else Level.YELLOW
        sentence = (
            f"The driver has logged Xid {number} for the GPU at {bus} since this machine started: what was cured since "
            "stays in its log until the next start."
        )
        told.append((level, sentence, f"dmesg -T | grep Xid   # when; then {XID_CURES[level]}"))
    if seen.failure:
        # Device nodes are here, and the tool that comes with them does not work.
        told.append((Level.YELLOW, f"GPUs are here, but their state is unknown: {seen.failure}.", "nvidia-smi"))
    gpus = facts.decision("GPUs")
    found = [Finding(check="gpus", level=level, sentence=sentence, cure=cure) for level, sentence, cure in told]
    return tuple(found) or (green("gpus", f"{gpus.value}: {gpus.reason}" if gpus else "here"),)


def _gpu_health(gpu: GpuHealth) -> Iterator[Told]:
    if gpu.used > GPU_MEMORY_USED:
        yield (
            Level.YELLOW,
            f"GPU {gpu.index}: {gpu.used} of {gpu.total} MiB are in use before this job starts: another job?",
            "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv",
        )
    if gpu.uncorrected:
        yield (
            Level.RED,
            f"GPU {gpu.index}: {gpu.uncorrected} memory errors (ECC) that could not be corrected.",
            f"nvidia-smi -i {gpu.index} -q -d ECC,ROW_REMAPPER   # then `nvidia-smi -r`, or replace it",
        )
    if gpu.slowed:
        yield (
            Level.YELLOW,
            f"GPU {gpu.index}: the hardware holds its clock down (heat or power).",
            f"nvidia-smi -i {gpu.index} -q -d PERFORMANCE,TEMPERATURE,POWER",
        )


def _gpu_peers(seen: GpuLook) -> Iterator[Told]:
    """What is in the way between GPUs, and from network cards into them."""
    translated = sorted({kind for kind in seen.iommu.values() if kind.startswith("DMA")})
    if translated:
        yield (
            Level.YELLOW,
            f"The IOMMU translates what GPUs send ({translated[0]}): transfers between GPUs, and from cards into them, "
            "are slow or hang.",
            "boot with iommu=pt (kernel command line), or switch the IOMMU and PCI ACS off in the BIOS",
        )
    if seen.redirecting:
        yield (
            Level.YELLOW,
            f"PCI ACS on {', '.join(seen.redirecting[:4])} sends what GPUs tell each other through the processor.",
            f"sudo setpci -s {seen.redirecting[0]} ECAP_ACS+6.w=0000   # each bridge named, at every boot; or the BIOS",
        )
    if seen.apart:
        one, other, word = seen.apart[0]
        pairs = f"{len(seen.apart)} pairs of GPUs" if len(seen.apart) > 1 else "One pair of GPUs"
        yield (
            Level.YELLOW,
            f"{pairs} cannot read each other's memory, such as {one} and {other} ({word}: {REASONS[word]}): what they "
            "exchange goes through the processor's memory.",
            "nvidia-smi topo -p2p r; nvidia-smi topo -m   # normal for GeForce cards; else a BIOS or driver setting",
        )


def check_limits(facts: Facts) -> tuple[Finding, ...]:
    limits = facts.decision("limits")
    return (green("limits", f"{limits.value}, {limits.reason}") if limits else skipped("limits", "not decided"),)


def check_disk(facts: Facts) -> tuple[Finding, ...]:
    """The file system below the checkpoint folder: room, writable, how fast."""
    disk = facts.look.disk
    if disk is None:
        return (skipped("disk", "the checkpoint folder is not decided"),)
    if disk.failure:
        sentence = f"{disk.folder}, where checkpoints go, cannot be written: {disk.failure}."
        cure = f"df -h {disk.folder}; namei -l {disk.folder}   # it must be writable for user {facts.host.uid}"
        return (Finding(check="disk", level=Level.RED, sentence=sentence, cure=cure),)
    found = []
    if disk.free < FREE_YELLOW:
        sentence = f"{disk.folder}, where checkpoints go, has {disk.free / 1e9:.1f} GB of {disk.total / 1e9:.0f} free."
        level = Level.RED if disk.free < FREE_RED else Level.YELLOW
        cure = "set CHECKPOINT_DIR or RUNS to a larger disk, or remove old runs"
        found.append(Finding(check="disk", level=level, sentence=sentence, cure=cure))
    if disk.inodes is not None and disk.inodes < FEW_INODES:
        sentence = f"{disk.folder} has room for only {disk.inodes} more files."
        found.append(Finding(check="disk", level=Level.RED, sentence=sentence, cure=f"df -i {disk.folder}"))
    if disk.speed is None or disk.speed < SLOW_DISK:
        speed = "took more than 1 s for a write" if disk.speed is None else f"writes {disk.speed / 1e6:.1f} MB/s"
        sentence = f"{disk.folder}, where checkpoints go, {speed}: saving will hold up the training."
        found.append(Finding(check="disk", level=Level.YELLOW, sentence=sentence, cure="set CHECKPOINT_DIR elsewhere"))
    told = f"{disk.folder}: {disk.free / 1e9:.0f} GB free, writes {(disk.speed or 0) / 1e6:.0f} MB/s"
    return tuple(found) or (green("disk", told),)


def check_clock(facts: Facts) -> tuple[Finding, ...]:
    source = facts.look.clock_source
    if source in SLOW_CLOCKS:
        sentence = f"The kernel's clock source is {source}: reading the time is slow, and torch reads it often."
        cure = "dmesg | grep -i tsc   # why the kernel gave up the processor's own clock"
        return (Finding(check="clock", level=Level.YELLOW, sentence=sentence, cure=cure),)
    return (green("clock", f"source {source}") if source else skipped("clock", "the source is not visible here"),)


def check_engine(facts: Facts) -> tuple[Finding, ...]:
    """Versions, where doctor runs beside the engine and not inside it."""
    versions = {name: version for name, version in facts.look.engine.items() if version}
    if not versions:
        asked = "; ".join(" ".join(command) for command in COMMANDS.values())
        where = "does not answer here" if facts.look.engine else "not visible from inside a container"
        return (skipped("engine", f"{where}; on the machine itself: {asked}"),)
    if "Compose" in versions and tuple(map(int, versions["Compose"].split(".")[:2])) < OLDEST_COMPOSE:
        sentence = f"Compose {versions['Compose']} is too old for compose.yaml, which needs 2.24."
        return (Finding(check="engine", level=Level.RED, sentence=sentence, cure="docker compose version"),)
    return (green("engine", ", ".join(f"{name} {version}" for name, version in versions.items())),)
