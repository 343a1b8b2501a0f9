"""Checks of this node besides its network: GPUs, limits, disk, clock."""

from collections.abc import Iterator, Mapping

from app.config.problems import count
from app.doctor.collect.engine import COMMANDS
from app.doctor.facts import Facts
from app.doctor.findings import Finding, Severity, Value, green, skipped, wrong
from app.host.accelerators import vendor_of
from app.host.accelerators.gpu import GpuFault, GpuHealth, GpuState
from app.plan.resource_checks import describe_limits
from app.plan.workers import describe_gpus

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
        found.append(wrong("gpu-state-unknown", failure=seen.failure, remedy=fixes["gpu-state-unknown"]))
    if found:
        return tuple(found)
    used = facts.plan.workers.gpus if facts.plan else len(gpus.visible)
    return (green("gpus", "{used}: {description}", used=used, description=describe_gpus(gpus)),)


def _gpu_health(gpu: GpuHealth, fixes: Mapping[str, str]) -> Iterator[Finding]:
    def found(id: str, **values: Value) -> Finding:
        return wrong(id, None, gpu=gpu.index, remedy=fixes.get(id, "").format(gpu=gpu.index), **values)

    if gpu.used > GPU_MEMORY_USED:
        yield found("gpu-memory-used", used=gpu.used, total=gpu.total)
    if gpu.uncorrected:
        yield found("gpu-ecc", errors=gpu.uncorrected)
    if gpu.slowed:
        yield found("gpu-slowed")


def _gpu_peers(seen: GpuState, fixes: Mapping[str, str]) -> Iterator[Finding]:
    """What is in the way between GPUs, and from network cards into them."""
    translated = sorted({kind for kind in seen.iommu.values() if kind.startswith("DMA")})
    if translated:
        yield wrong("gpu-iommu", mode=translated[0])
    if seen.redirecting:
        yield wrong("gpu-acs", bridges=", ".join(seen.redirecting[:4]), first=seen.redirecting[0])
    if seen.apart:
        one, other, reason = seen.apart[0]
        pairs, remedy = count(len(seen.apart), "pair"), fixes.get("gpu-no-p2p", "")
        yield wrong("gpu-no-p2p", pairs=pairs, first=one, second=other, reason=reason, remedy=remedy)


def _fault(fault: GpuFault, fixes: Mapping[str, str]) -> Finding:
    id = "gpu-dead" if fault.dead else "gpu-fault"
    return wrong(id, fault=fault.name, bus=fault.bus, remedy=fixes[id])


def check_limits(facts: Facts) -> tuple[Finding, ...]:
    cpus, limits = count(facts.host.limits.cpus, "CPU"), describe_limits(facts.host)
    return (green("limits", "{cpus}, {limits}", cpus=cpus, limits=limits),)


def check_disk(facts: Facts) -> tuple[Finding, ...]:
    """The file system below the checkpoint folder: room, writable, how fast."""
    disk = facts.live.disk
    if disk is None:
        return (skipped("disk", "the checkpoint folder is not decided"),)
    folder = disk.folder
    if disk.failure:
        return (wrong("disk-not-writable", folder=folder, failure=disk.failure, uid=facts.host.uid),)
    found = []
    if disk.free < FREE_YELLOW:
        level = Severity.RED if disk.free < FREE_RED else Severity.YELLOW
        found.append(wrong("disk-full", level, folder=folder, free=disk.free / 1e9, total=disk.total / 1e9))
    if disk.inodes is not None and disk.inodes < FEW_INODES:
        found.append(wrong("disk-inodes", folder=folder, inodes=disk.inodes))
    if disk.speed is None or disk.speed < SLOW_DISK:
        speed = "took more than 1 s for a write" if disk.speed is None else f"writes {disk.speed / 1e6:.1f} MB/s"
        found.append(wrong("disk-slow", folder=folder, speed=speed))
    text = "{folder}: {free:.0f} GB free, writes {speed:.0f} MB/s"
    return tuple(found) or (green("disk", text, folder=folder, free=disk.free / 1e9, speed=(disk.speed or 0) / 1e6),)


def check_clock(facts: Facts) -> tuple[Finding, ...]:
    source = facts.live.clock_source
    if source in SLOW_CLOCKS:
        return (wrong("clock-source-slow", source=source),)
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
        return (wrong("compose-too-old", version=compose),)
    return (green("engine", "{versions}", versions=", ".join(f"{name} {text}" for name, text in versions.items())),)
