"""Checks of this node besides its network: GPUs, limits, disk, clock."""

from app.doctor.facts import Facts
from app.doctor.findings import Finding, Level, green, skipped
from app.doctor.look import Look

FREE_RED, FREE_YELLOW = 1 << 30, 10 << 30
FEW_INODES = 1000
SLOW_DISK = 20e6
"""Bytes per second: a checkpoint of 1 GB takes a minute."""
GPU_MEMORY_USED = 1024
"""MiB; the driver itself takes a few hundred."""
SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies")


def check_gpus(facts: Facts) -> tuple[Finding, ...]:
    if not facts.host.gpus.visible:
        return (skipped("gpus", "no GPU here: workers run on the CPU"),)
    found = [finding for gpu in facts.look.gpus for finding in _gpu_health(gpu.index, facts.look)]
    translated = sorted({kind for kind in facts.look.iommu.values() if kind.startswith("DMA")})
    if translated and len(facts.host.gpus.visible) > 1:
        sentence = (
            f"The IOMMU translates what GPUs send ({translated[0]}): transfers between GPUs, and from cards into them, "
            "are slow or hang."
        )
        cure = "boot with iommu=pt (kernel command line), or switch the IOMMU and PCI ACS off in the BIOS"
        found.append(Finding(check="gpus", level=Level.YELLOW, sentence=sentence, cure=cure))
    if facts.look.gpu_failure:
        # Device nodes are here, and the tool that comes with them does not work.
        sentence = f"GPUs are here, but their state is unknown: {facts.look.gpu_failure}."
        found.append(Finding(check="gpus", level=Level.YELLOW, sentence=sentence, cure="nvidia-smi"))
    gpus = facts.decision("GPUs")
    return tuple(found) or (green("gpus", f"{gpus.value}: {gpus.reason}" if gpus else "here"),)


def _gpu_health(index: int, look: Look) -> list[Finding]:
    gpu = next(each for each in look.gpus if each.index == index)
    told: list[tuple[Level, str, str]] = []
    if gpu.used > GPU_MEMORY_USED:
        told.append(
            (
                Level.YELLOW,
                f"GPU {index}: {gpu.used} of {gpu.total} MiB are in use before this job starts: another job?",
                "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv",
            )
        )
    if gpu.uncorrected:
        told.append(
            (
                Level.RED,
                f"GPU {index}: {gpu.uncorrected} memory errors (ECC) that could not be corrected.",
                f"nvidia-smi -i {index} -q -d ECC   # then `nvidia-smi -r`, or replace it",
            )
        )
    if gpu.slowed:
        told.append(
            (
                Level.YELLOW,
                f"GPU {index}: the hardware holds its clock down (heat or power).",
                f"nvidia-smi -i {index} -q -d PERFORMANCE,TEMPERATURE,POWER",
            )
        )
    return [Finding(check="gpus", level=level, sentence=sentence, cure=cure) for level, sentence, cure in told]


def check_limits(facts: Facts) -> tuple[Finding, ...]:
    limits = facts.decision("limits")
    return (green("limits", limits.value) if limits else skipped("limits", "not decided"),)


def check_disk(facts: Facts) -> tuple[Finding, ...]:
    """The file system below the checkpoint folder: room, writable, how fast."""
    disk = facts.look.disk
    if disk is None:
        return (skipped("disk", "the checkpoint folder is not decided"),)
    if disk.failure:
        sentence = f"{disk.folder}, where checkpoints go, cannot be written: {disk.failure}."
        cure = f"df -h {disk.folder}; ls -ld {disk.folder}   # it must be writable for user {facts.host.uid}"
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
