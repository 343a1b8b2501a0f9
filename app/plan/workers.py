"""Workers on this node: how many, on what device, with how many threads."""

import re
from itertools import takewhile

from app.config.settings import Settings
from app.host import Host
from app.plan.decisions import Ledger, count, shown
from app.plan.exports import Exports
from app.plan.parts import Workers


def decide_workers(settings: Settings, host: Host, ledger: Ledger, exports: Exports) -> Workers:
    """Number of processes, backend and OMP_NUM_THREADS; problems go to the ledger and the answer stays usable."""
    _check_hardware(settings, host, ledger)
    gpus, gpu_reason = _usable_gpus(settings, host)
    if host.gpus.visible:
        versions = ", ".join(
            part for part in (f"driver {host.gpus.driver}", f"CUDA up to {host.gpus.cuda}") if part[-1].isdigit()
        )
        ledger.decide("GPUs", gpus, "detected", f"{gpu_reason}{'; ' + versions if versions else ''}")
    else:
        ledger.decide("GPUs", 0, "detected", gpu_reason)
    asked = settings.text("NPROC_PER_NODE")
    backend = _backend(settings, host, gpus, asked, ledger)
    nproc = _nproc(settings, host, gpus, backend, ledger)
    exports.env["BACKEND"] = backend
    cpus = host.limits.cpus
    exports.offer(
        "OMP_NUM_THREADS",
        max(1, cpus // nproc),
        f"{count(cpus, 'CPU')} allowed, shared by {count(nproc, 'process', 'processes')}",
    )
    return Workers(nproc=nproc, backend=backend, gpus=gpus)


def _usable_gpus(settings: Settings, host: Host) -> tuple[int, str]:
    """The GPUs that torch will count, and why."""
    there = len(host.gpus.visible)
    names = ", ".join(sorted({gpu.name for gpu in host.gpus.visible}))
    mask = settings.values.get("CUDA_VISIBLE_DEVICES")
    if mask is None or not there:
        return there, f"{names}" if there else "no NVIDIA device node here"
    left = _left_by(mask.text, there)
    return left, f"{there} x {names}, of which {shown('CUDA_VISIBLE_DEVICES', mask)} leaves {left}"


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
    mask = settings.values.get("CUDA_VISIBLE_DEVICES")
    if mask is not None and host.gpus.visible:
        return f"{shown('CUDA_VISIBLE_DEVICES', mask)} leaves no GPU", "correct CUDA_VISIBLE_DEVICES"
    if host.container:
        return "there is no GPU here", "give the container its GPUs with HARDWARE=nvidia"
    return "there is no GPU here", "install the NVIDIA driver"


def _check_hardware(settings: Settings, host: Host, ledger: Ledger) -> None:
    word = settings.values.get("HARDWARE")
    if word is not None:
        ledger.take("HARDWARE", word, "what compose asks of the engine for the container")
    cards = len(host.gpus.on_bus)
    if word is None and cards and not host.gpus.visible:
        if not host.container:
            ledger.warn(
                f"This machine has {count(cards, 'NVIDIA GPU')}, but no driver offers them: training runs on the CPU."
            )
            return
        fitting = "nvidia-ib" if host.rdma_ports else "nvidia"
        ledger.refuse(
            "HARDWARE",
            f"HARDWARE is not set, and this machine has {count(cards, 'NVIDIA GPU')} that the "
            f"container was not given. Set HARDWARE={fitting} in .env (or HARDWARE=cpu to train without "
            f"{'them' if cards > 1 else 'it'}).",
        )
    if word is not None and word.text != "cpu" and not host.gpus.visible and settings.text("BACKEND") != "gloo":
        ledger.refuse(
            "HARDWARE",
            f"{shown('HARDWARE', word)}, but no GPU is here: no /dev/nvidia0. Install the NVIDIA driver and the "
            "container toolkit on this machine, or set HARDWARE=cpu.",
        )


def _backend(settings: Settings, host: Host, gpus: int, asked: str, ledger: Ledger) -> str:
    value = settings.get("BACKEND")
    cpu_build = host.packages.get("torch", "").endswith("+cpu")
    if value is not None and value.text in ("gloo", "nccl"):
        ledger.take("BACKEND", value, "as you set it")
        if value.text == "nccl" and (not gpus or cpu_build):
            why = _absence(settings, host)[0] if not gpus else f"torch {host.packages['torch']} is built without CUDA"
            ledger.refuse("BACKEND", f"{shown('BACKEND', value)}, but {why}. Set BACKEND=gloo, or leave it out.")
        return value.text
    if not gpus:
        backend, reason = "gloo", _absence(settings, host)[0]
    elif settings.text("HARDWARE") == "cpu":
        backend, reason = "gloo", "HARDWARE=cpu asks for workers on the CPU"
    elif cpu_build:
        backend, reason = "gloo", f"torch {host.packages['torch']} is built without CUDA"
        ledger.warn(
            f"{count(gpus, 'GPU')} here, but torch {host.packages['torch']} is built without CUDA: training runs "
            "on the CPU. Build the image with HARDWARE=nvidia, or set HARDWARE=cpu."
        )
    elif asked == "cpu":
        backend, reason = "gloo", "NPROC_PER_NODE=cpu asks for CPU workers"
    else:
        backend, reason = "nccl", f"{count(gpus, 'GPU')} here"
    ledger.decide("BACKEND", backend, "derived", reason)
    return backend


def _nproc(settings: Settings, host: Host, gpus: int, backend: str, ledger: Ledger) -> int:
    value = settings.get("NPROC_PER_NODE")
    if value is None or value.text == "auto":
        source = "default" if value is None else value.source
        if backend == "nccl":
            ledger.decide("NPROC_PER_NODE", gpus, source, f"auto: one process per GPU, {gpus} here")
            return max(1, gpus)
        cpus = host.limits.cpus
        ledger.decide("NPROC_PER_NODE", cpus, source, f"auto without a GPU: one process per CPU, {cpus} allowed here")
        return cpus
    if value.text == "cpu":
        ledger.decide("NPROC_PER_NODE", host.limits.cpus, value.source, "cpu: one process per CPU allowed here")
        return host.limits.cpus
    if value.text == "gpu":
        if not gpus:
            why, cure = _absence(settings, host)
            ledger.refuse(
                "NPROC_PER_NODE",
                f"{shown('NPROC_PER_NODE', value)}, but {why}. Set a number or cpu, or {cure}.",
            )
        ledger.decide("NPROC_PER_NODE", max(1, gpus), value.source, f"gpu: one process per GPU, {gpus} here")
        return max(1, gpus)
    nproc = int(value.text)
    ledger.take("NPROC_PER_NODE", value, "as you set it")
    if backend == "nccl" and gpus and nproc > gpus:  # NCCL without any GPU is refused with BACKEND
        ledger.refuse(
            "NPROC_PER_NODE",
            f"{shown('NPROC_PER_NODE', value)}, but this node has {count(gpus, 'usable GPU')}, and NCCL needs one for "
            f"each process. Set at most {gpus}, or auto.",
        )
    return nproc
