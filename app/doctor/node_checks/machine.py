"""Checks of this node besides its network: GPUs, limits, disk, clock."""

from collections.abc import Iterator, Mapping

from app.config.problems import count
from app.doctor.collect.engine import COMMANDS
from app.doctor.facts import Facts
from app.doctor.findings import Finding, Severity, green, red, skipped, yellow
from app.host.accelerators import vendor_of
from app.host.accelerators.gpu import GpuFault, GpuHealth, GpuState

FREE_RED, FREE_YELLOW = 1 << 30, 10 << 30
FEW_INODES = 1000
SLOW_DISK = 20e6
"""Bytes per second: a checkpoint of 1 GB takes a minute."""
GPU_MEMORY_USED = 1024
"""MiB; the driver itself takes a few hundred."""
MANY_FAULTS = 8
OLDEST_COMPOSE = (2, 24)
"""compose.yaml uses `env_file: required: false`."""
SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies")


def check_gpus(facts: Facts) -> tuple[Finding, ...]:
    """Their health, and how they reach each other."""
    gpus, seen = facts.host.gpus, facts.live.gpus
    if not gpus.visible:
        return (skipped("gpus", "no GPU here: workers run on the CPU"),)
    fixes = vendor_of(gpus).fixes
    found = [finding for gpu in seen.health for finding in _gpu_health(gpu, fixes)]
    if len(gpus.visible) > 1:
        found += _gpu_peers(seen, fixes)
    found += [_fault(fault, fixes) for fault in seen.faults[:MANY_FAULTS]]
    if seen.failure:
        # Device nodes are here, and the tool that comes with them does not work.
        text = "GPUs are here, but their state is unknown: {failure}."
        found.append(yellow("gpu-state-unknown", "gpus", text, fixes["gpu-state-unknown"], failure=seen.failure))
    decided = facts.decision("GPUs")
    if decided is None:
        return tuple(found) or (green("gpus", "here"),)
    return tuple(found) or (green("gpus", "{gpus}: {reason}", gpus=decided.value, reason=decided.reason),)


def _gpu_health(gpu: GpuHealth, fixes: Mapping[str, str]) -> Iterator[Finding]:
    def fix(id_: str) -> str:
        return fixes.get(id_, "").format(gpu=gpu.index)

    if gpu.used > GPU_MEMORY_USED:
        id_, text = (
            "gpu-memory-used",
            "GPU {gpu}: {used} of {total} MiB are in use before this job starts: another job?",
        )
        yield yellow(id_, "gpus", text, fix(id_), gpu=gpu.index, used=gpu.used, total=gpu.total)
    if gpu.uncorrected:
        id_, text = "gpu-ecc", "GPU {gpu}: {errors} memory errors (ECC) that could not be corrected."
        yield red(id_, "gpus", text, fix(id_), gpu=gpu.index, errors=gpu.uncorrected)
    if gpu.slowed:
        id_, text = "gpu-slowed", "GPU {gpu}: the hardware holds its clock down (heat or power)."
        yield yellow(id_, "gpus", text, fix(id_), gpu=gpu.index)


def _gpu_peers(seen: GpuState, fixes: Mapping[str, str]) -> Iterator[Finding]:
    """What is in the way between GPUs, and from network cards into them."""
    translated = sorted({kind for kind in seen.iommu.values() if kind.startswith("DMA")})
    if translated:
        text = (
            "The IOMMU translates what GPUs send ({mode}): transfers between GPUs, and from cards into them, are slow "
            "or hang."
        )
        fix = "boot with iommu=pt (kernel command line), or switch the IOMMU and PCI ACS off in the BIOS"
        yield yellow("gpu-iommu", "gpus", text, fix, mode=translated[0])
    if seen.redirecting:
        text = "PCI ACS on {bridges} sends what GPUs tell each other through the processor."
        first = seen.redirecting[0]
        fix = f"sudo setpci -s {first} ECAP_ACS+6.w=0000   # each bridge named, at every boot; or the BIOS"
        yield yellow("gpu-acs", "gpus", text, fix, bridges=", ".join(seen.redirecting[:4]))
    if seen.apart:
        one, other, reason = seen.apart[0]
        text = (
            "{pairs} of GPUs cannot read each other's memory, such as {first} and {second} ({reason}): what they "
            "exchange goes through the processor's memory."
        )
        pairs = count(len(seen.apart), "pair")
        fix = fixes.get("gpu-no-p2p", "")
        yield yellow("gpu-no-p2p", "gpus", text, fix, pairs=pairs, first=one, second=other, reason=reason)


def _fault(fault: GpuFault, fixes: Mapping[str, str]) -> Finding:
    id_ = "gpu-dead" if fault.dead else "gpu-fault"
    return Finding(
        id=id_,
        check="gpus",
        severity=Severity.RED if fault.dead else Severity.YELLOW,
        text="The driver has logged {fault} for the GPU at {bus} since this machine started. What was fixed since then "
        "stays in its log until the next start.",
        values={"fault": fault.name, "bus": fault.bus},
        fix=fixes[id_],
    )


def check_limits(facts: Facts) -> tuple[Finding, ...]:
    limits = facts.decision("limits")
    if limits is None:
        return (skipped("limits", "not decided"),)
    return (green("limits", "{cpus}, {limits}", cpus=limits.value, limits=limits.reason),)


def check_disk(facts: Facts) -> tuple[Finding, ...]:
    """The file system below the checkpoint folder: room, writable, how fast."""
    disk = facts.live.disk
    if disk is None:
        return (skipped("disk", "the checkpoint folder is not decided"),)
    folder = disk.folder
    if disk.failure:
        text = "{folder}, where checkpoints go, cannot be written: {failure}."
        fix = f"df -h {folder}; namei -l {folder}   # it must be writable for user {facts.host.uid}"
        return (red("disk-not-writable", "disk", text, fix, folder=folder, failure=disk.failure),)
    found = []
    if disk.free < FREE_YELLOW:
        level = red if disk.free < FREE_RED else yellow
        text = "{folder}, where checkpoints go, has {free:.1f} GB of {total:.0f} free."
        fix = "set CHECKPOINT_DIR or RUNS to a larger disk, or remove old runs"
        found.append(level("disk-full", "disk", text, fix, folder=folder, free=disk.free / 1e9, total=disk.total / 1e9))
    if disk.inodes is not None and disk.inodes < FEW_INODES:
        text = "{folder} has room for only {inodes} more files."
        found.append(red("disk-inodes", "disk", text, f"df -i {folder}", folder=folder, inodes=disk.inodes))
    if disk.speed is None:
        text = "{folder}, where checkpoints go, took more than 1 s for a write: saving will hold up the training."
        found.append(yellow("disk-slow", "disk", text, "set CHECKPOINT_DIR elsewhere", folder=folder))
    elif disk.speed < SLOW_DISK:
        text = "{folder}, where checkpoints go, writes {speed:.1f} MB/s: saving will hold up the training."
        fix = "set CHECKPOINT_DIR elsewhere"
        found.append(yellow("disk-slow", "disk", text, fix, folder=folder, speed=disk.speed / 1e6))
    text = "{folder}: {free:.0f} GB free, writes {speed:.0f} MB/s"
    return tuple(found) or (green("disk", text, folder=folder, free=disk.free / 1e9, speed=(disk.speed or 0) / 1e6),)


def check_clock(facts: Facts) -> tuple[Finding, ...]:
    source = facts.live.clock_source
    if source in SLOW_CLOCKS:
        text = "The kernel's clock source is {source}: reading the time is slow, and torch reads it often."
        fix = "dmesg | grep -i tsc   # why the kernel gave up the processor's own clock"
        return (yellow("clock-source-slow", "clock", text, fix, source=source),)
    if not source:
        return (skipped("clock", "the source is not visible here"),)
    return (green("clock", "source {source}", source=source),)


def check_engine(facts: Facts) -> tuple[Finding, ...]:
    """Versions, where doctor runs beside the engine and not inside it."""
    versions = {name: version for name, version in facts.live.engine.items() if version}
    if not versions:
        asked = "; ".join(" ".join(command) for command in COMMANDS.values())
        where = "does not answer here" if facts.live.engine else "not visible from inside a container"
        return (skipped("engine", "{where}; on the machine itself: {commands}", where=where, commands=asked),)
    compose = versions.get("Compose")
    if compose and tuple(map(int, compose.split(".")[:2])) < OLDEST_COMPOSE:
        text = "Compose {version} is too old for compose.yaml, which needs 2.24."
        return (red("compose-too-old", "engine", text, "docker compose version", version=compose),)
    return (green("engine", "{versions}", versions=", ".join(f"{name} {text}" for name, text in versions.items())),)
