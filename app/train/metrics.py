"""What a run tells: the times and losses between two lines, JSON lines, TensorBoard events, and who is slow."""

import importlib.util
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from app.train.ranks import agree

SLOW = 1.25
"""A rank is slow when its own work takes so many times that of the median rank."""
PERSISTENT = 30
"""It is named after so many steps of slow lines in a row."""
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 peak of one GPU in FLOP/s, from NVIDIA's data sheets. For an unknown device there is no MFU."""

Mark = Any
"""A point on the device's time line: a CUDA event, or seconds."""


class Clock:
    """Takes times on the device's own time line, which are read at log lines only: steps never wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.ready: Mark = None
        """When the last gradient was there and only the other ranks were missing."""

    def mark(self) -> Mark:
        """Now."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def gradients_are_there(self) -> None:
        """Called by the backward pass."""
        self.ready = self.mark()

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Seconds between two marks that the device has passed."""
        return float(begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin)


@dataclass(slots=True)
class Window:
    """The steps since the last line. Losses and norms stay on the device until the line."""

    started: float = field(default_factory=time.perf_counter)
    losses: list[Tensor] = field(default_factory=list)
    """This rank's part of the mean loss in nats per token, one scalar per step."""
    norms: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    data_seconds: float = 0.0
    marks: list[tuple[Mark, Mark, Mark]] = field(default_factory=list)
    """Per step: begin of the forward, last gradient there, gradients of all ranks summed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A window, the same on all ranks."""

    losses: list[float]
    norms: list[float]
    shares: list[list[float]]
    """Seconds per step for data, compute and waiting, of each rank."""
    seconds: float
    """Wall-clock time of the whole window on this rank."""


def summarize(window: Window, clock: Clock) -> Summary:
    """The one synchronisation with the device, and one all-reduce over all ranks, per line."""
    rank, world, steps = dist.get_rank(), dist.get_world_size(), len(window.losses)
    losses = torch.stack(window.losses).double().cpu()
    norms: list[float] = torch.stack(window.norms).double().tolist()
    shares = torch.zeros(world, 3, dtype=torch.float64)
    shares[rank, 0] = window.data_seconds / steps
    shares[rank, 1] = sum(clock.seconds(begin, ready) for begin, ready, _ in window.marks) / steps
    shares[rank, 2] = sum(clock.seconds(ready, end) for _, ready, end in window.marks) / steps
    together = torch.cat([losses, shares.flatten()])
    dist.all_reduce(together)
    return Summary(
        losses=together[:steps].tolist(),
        norms=norms,
        shares=together[steps:].view(world, 3).tolist(),
        seconds=time.perf_counter() - window.started,
    )


class SlowRanks:
    """Names ranks whose own work is persistently slower than the median's, each once until it recovers."""

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}

    def update(self, shares: Sequence[Sequence[float]], names: Sequence[str], *, steps: int) -> list[str]:
        """Sentences about the ranks that a line over so many steps has shown to be persistently slow."""
        sentences = []
        busy = [data + compute for data, compute, _ in shares]
        median = statistics.median_low(busy)
        for rank, (data, compute, wait) in enumerate(shares):
            slow = busy[rank] > SLOW * median
            before = self.steps.get(rank, 0)
            self.steps[rank] = before + steps if slow else 0
            if before < PERSISTENT <= self.steps[rank]:
                whole = max(data + compute + wait, 1e-9)
                sentences.append(
                    f"slow: {names[rank]} takes {busy[rank] / median:.1f} times the median rank's time for its work "
                    f"({data / whole:.0%} data, {compute / whole:.0%} compute, {wait / whole:.0%} waiting for others)"
                )
        return sentences


class Journal:
    """Writes metrics.jsonl and TensorBoard events into the run folder. A full disk costs the records, not the run."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        """Only rank 0 writes."""
        self.path, self.say, self.failed = run_dir / "metrics.jsonl", say, False
        self.board: Any = None
        if dist.get_rank() == 0 and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends one JSON object a line; numbers but for `step` and `time` go to TensorBoard as well."""
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            for record in records if self.board else ():
                for name in record.keys() - {"step", "time"}:
                    self.board.add_scalar(name, record[name], record["step"])
            if self.board:
                # The process ends without any clean-up, see ranks.leave.
                self.board.flush()
        except OSError as error:
            if not self.failed:
                self.say(f"metrics cannot be written to {self.path}: {error.strerror}. Training goes on without.")
            self.failed = True

    def keep(self, name: str, content: bytes) -> None:
        """Writes a file beside the metrics."""
        try:
            self.path.with_name(name).write_bytes(content)
        except OSError as error:
            self.say(f"{name} cannot be written to {self.path.parent}: {error.strerror}.")

    def read(self) -> dict[int, dict[str, Any]]:
        """What was written last about each step, earlier starts of the run included; a torn line is left out."""
        merged: dict[int, dict[str, Any]] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                record = json.loads(line)
                merged.setdefault(record["step"], {}).update(record)
            except (ValueError, KeyError, TypeError):
                continue
        return merged


def open_journal(run_dir: str, say: Callable[[str], None]) -> Journal:
    """The journal of a run, on all ranks.

    Raises:
        UserError: rank 0 cannot write there.
    """
    folder, problem = Path(run_dir), ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if dist.get_rank() == 0:
            (folder / "metrics.jsonl").touch()
    except OSError as error:
        problem = f"RUN_DIR={folder} cannot be written: {error.strerror} (user id {os.getuid()})."
    agree(problem)
    return Journal(folder, say)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s, or None when the device is unknown."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)
