"""Workers on this node: how many, on what device, with how many threads."""

import re
from itertools import takewhile

from app.config.problems import count
from app.config.settings import Settings
from app.config.values import Value, plain
from app.host import Host
from app.host.accelerators import vendor_for, vendor_of
from app.host.accelerators.gpu import Gpus
from app.plan.decisions import Ledger
from app.plan.exports import Exports
from app.plan.parts import LocalWorkers


def decide_workers(settings: Settings, host: Host, ledger: Ledger, exports: Exports) -> LocalWorkers:
    """Number of processes, backend and OMP_NUM_THREADS; problems go to the ledger and the answer stays usable."""
    _check_hardware(settings, host, ledger)
    gpus = _usable_gpus(settings, host, ledger)
    backend = _backend(settings, host, gpus, ledger)
    nproc = _nproc(settings, host, gpus, backend, ledger)
    exports.env["BACKEND"] = backend
    cpus = host.limits.cpus
    shared = f"{count(cpus, 'CPU')} allowed, shared by {count(nproc, 'process', 'processes')}"
    exports.offer("gpus", "OMP_NUM_THREADS", max(1, cpus // nproc), shared)
    return LocalWorkers(nproc=nproc, backend=backend, gpus=gpus)


def _usable_gpus(settings: Settings, host: Host, ledger: Ledger) -> int:
    """The GPUs that torch will count."""
    there = len(host.gpus.visible)
    if not there:
        ledger.decide("gpus", "GPUs", 0, "detected", "no GPU's device node here")
        return 0
    mask = _mask(settings, host)
    left = there if mask is None else _left_by(mask.text, there)
    hidden = "" if mask is None else f"; {there} are here, and {mask} leaves {left}"
    ledger.decide("gpus", "GPUs", left, "detected", f"{describe_gpus(host.gpus)}{hidden}")
    return left


def describe_gpus(gpus: Gpus) -> str:
    """`NVIDIA A100; driver 580.82, CUDA up to 13.0`."""
    names = ", ".join(sorted({gpu.name for gpu in gpus.visible}))
    versions = [f"driver {gpus.driver}", f"{vendor_of(gpus).runtime} up to {gpus.runtime}"]
    known = ", ".join(part for part in versions if part[-1].isdigit())
    return f"{names}{'; ' if known else ''}{known}"


def _mask(settings: Settings, host: Host) -> Value[str] | None:
    """The variable that hides GPUs. An empty one hides all of them, as CUDA and torch take it."""
    for name in vendor_of(host.gpus).masks:
        if name in settings.values:
            return settings.values[name]
        if name in settings.given:
            return plain(name, "", "environment")
    return None


def _left_by(mask: str, there: int) -> int:
    """What torch counts (`_parse_visible_devices` in torch/cuda/__init__.py): a repeated entry leaves none, and the
    first entry that is no device ends the list."""
    kind = next((prefix for prefix in ("GPU-", "MIG-") if mask.startswith(prefix)), "[0-9]")
    entries = list(takewhile(lambda entry: re.match(kind, entry), (entry.strip() for entry in mask.split(","))))
    if len(set(entries)) < len(entries):
        return 0
    return len(list(takewhile(lambda entry: not entry.isdecimal() or int(entry) < there, entries)))


def _absence(settings: Settings, host: Host) -> tuple[str, str]:
    """Why torch will count no GPU, and what would give it some."""
    mask, vendor = _mask(settings, host), vendor_of(host.gpus)
    if mask is not None and host.gpus.visible:
        return f"{mask} leaves no GPU", f"correct {mask.name}"
    if host.container:
        return "there is no GPU here", f"give the container its GPUs with HARDWARE={vendor.hardware}"
    return "there is no GPU here", f"install the {vendor.name} driver"


def _check_hardware(settings: Settings, host: Host, ledger: Ledger) -> None:
    word, cards, vendor = settings.hardware, len(host.gpus.on_bus), vendor_of(host.gpus)
    if word is not None:
        ledger.take("gpus", word, "what compose asks of the engine for the container")
    if host.gpus.visible:
        return
    if word is None and cards and not host.container:
        ledger.warn("gpus.no-driver", setting="HARDWARE", cards=cards, vendor=vendor.name)
    elif word is None and cards:
        ledger.refuse(
            "gpus.hardware-unset",
            setting="HARDWARE",
            cards=cards,
            vendor=vendor.name,
            several=cards > 1,
            fitting=vendor.hardware_rdma if host.rdma_ports else vendor.hardware,
        )
    elif word is not None and word.value != "cpu" and settings.backend.value != "gloo":
        meant = vendor_for(word.value)
        ledger.refuse("gpus.none-here", given=word, node=meant.device_node, driver=meant.driver)


def _backend(settings: Settings, host: Host, gpus: int, ledger: Ledger) -> str:
    torch, vendor = host.packages.get("torch", ""), vendor_of(host.gpus)
    unfit = f"torch {torch} is built without {vendor.runtime}" if re.search(vendor.unfit_torch, torch) else ""
    absence = "" if gpus else _absence(settings, host)[0]
    asked = settings.backend
    if asked.value != "auto":
        ledger.take("gpus", asked, "as you set it")
        if asked.value == "nccl" and (absence or unfit):
            ledger.refuse("gpus.nccl-without-gpu", given=asked, why=absence or unfit)
        return asked.value
    on_cpu = absence
    if not on_cpu and settings.hardware is not None and settings.hardware.value == "cpu":
        on_cpu = "HARDWARE=cpu asks for workers on the CPU"
    elif not on_cpu and unfit:
        on_cpu = unfit
        ledger.warn("gpus.torch-without-cuda", setting="HARDWARE", gpus=gpus, why=unfit, hardware=vendor.hardware)
    elif not on_cpu and settings.nproc_per_node.value == "cpu":
        on_cpu = "NPROC_PER_NODE=cpu asks for CPU workers"
    backend = "gloo" if on_cpu else "nccl"
    ledger.decide("gpus", "BACKEND", backend, "derived", on_cpu or f"{count(gpus, 'GPU')} here")
    return backend


def _nproc(settings: Settings, host: Host, gpus: int, backend: str, ledger: Ledger) -> int:
    asked, cpus = settings.nproc_per_node, host.limits.cpus
    if isinstance(asked.value, int):
        ledger.take("gpus", asked, "as you set it")
        if backend == "nccl" and gpus and asked.value > gpus:  # NCCL without any GPU is refused with BACKEND
            ledger.refuse("gpus.too-few", given=asked, gpus=gpus)
        return asked.value
    if asked.value == "gpu" and not gpus:
        why, remedy = _absence(settings, host)
        ledger.refuse("gpus.none-to-count", given=asked, why=why, remedy=remedy)
    if asked.value == "gpu" or (asked.value == "auto" and backend == "nccl"):
        nproc, reason = max(1, gpus), f"{asked.value}: one process per GPU, {gpus} here"
    elif asked.value == "auto":
        nproc, reason = cpus, f"auto without a GPU: one process per CPU, {cpus} allowed here"
    else:
        nproc, reason = cpus, "cpu: one process per CPU allowed here"
    ledger.decide("gpus", "NPROC_PER_NODE", nproc, asked.source, reason)
    return nproc
