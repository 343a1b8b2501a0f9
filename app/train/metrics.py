"""What a run tells: lines, JSON, TensorBoard events, slow ranks, a trace, and at the end the loss as a PNG."""

import importlib.util
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from app.train.settings import TrainSettings, say

if TYPE_CHECKING:
    from PIL.Image import Image

SLOW = 1.25
"""A rank is slow when its own work takes so many times that of the median rank."""
SURPLUS = 0.1
"""And when that makes every step longer by such a share: of two tiny figures one may be any multiple of the other."""
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
PROFILED_STEPS = 3

Mark = Any
"""A point on the device's time line: a CUDA event, or seconds. Read at log lines only: steps never wait for a GPU."""


class Step(NamedTuple):
    """One step as this rank saw it; loss and norm stay on the device until the line."""

    loss: Tensor
    """This rank's part of the mean loss in nats per token."""
    norm: Tensor
    rate: float
    marks: tuple[Mark, Mark, Mark, Mark]
    """It began; its data was there; this rank's last gradient was, only others' were missing; all gradients were."""


def mark(device: torch.device) -> Mark:
    """Now."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def _seconds(begin: Mark, end: Mark) -> float:
    return float(end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000)


def gather(steps: Sequence[Step]) -> tuple[list[float], list[float], list[list[float]]]:
    """Losses and norms by step, and seconds per step for data, compute and waiting by rank: the same on all ranks.

    The one synchronisation with the device, and one all-reduce, per line.
    """
    losses = torch.stack([step.loss for step in steps]).double().cpu()
    norms: list[float] = torch.stack([step.norm for step in steps]).double().tolist()
    own = [[_seconds(begin, end) for begin, end in pairwise(step.marks)] for step in steps]
    shares = torch.zeros(dist.get_world_size(), 3, dtype=torch.float64)
    shares[dist.get_rank()] = torch.tensor(own, dtype=torch.float64).mean(0)
    together = torch.cat([losses, shares.flatten()])
    dist.all_reduce(together)
    return together[: len(steps)].tolist(), norms, together[len(steps) :].view_as(shares).tolist()


def slow_ranks(
    slow_for: dict[int, int], shares: Sequence[Sequence[float]], names: Sequence[str], *, steps: int
) -> list[str]:
    """A sentence about each rank that has just become persistently slow; it is named again only after it recovered.

    `slow_for` counts the steps of slow lines in a row, by rank.
    """
    sentences = []
    busy, waits = [data + compute for data, compute, _ in shares], [wait for _, _, wait in shares]
    median, usual_wait = statistics.median_low(busy), statistics.median_low(waits)
    for rank, parts in enumerate(shares):
        before = slow_for.get(rank, 0)
        # The others wait for a slow rank. One that waits itself, and longer than they do, holds nobody up.
        is_slow = (
            busy[rank] > SLOW * median and busy[rank] - median >= SURPLUS * sum(parts) and waits[rank] <= usual_wait
        )
        slow_for[rank] = before + steps if is_slow else 0
        if before < PERSISTENT <= slow_for[rank]:
            data, compute, wait = (part / sum(parts) for part in parts)
            sentences.append(
                f"slow: {names[rank]} takes {busy[rank] / median:.1f} times the median rank's time for its work "
                f"({data:.0%} data, {compute:.0%} compute, {wait:.0%} waiting for others)"
            )
    return sentences


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s, or None when the device is unknown."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


class Metrics:
    """What happened since the last line, on this rank; rank 0 tells. A full disk costs records, not the run."""

    def __init__(self, settings: TrainSettings, names: Sequence[str], device_name: str, flops_per_token: int) -> None:
        """`names` are those of all ranks, to tell the slow ones apart."""
        self.settings, self.names = settings, names
        self.path = Path(settings.run_dir, "metrics.jsonl")
        peak = peak_flops(device_name)
        self.peak_tokens = peak and peak * len(names) / flops_per_token
        self.began, self.steps = time.perf_counter(), list[Step]()
        self.slow_for: dict[int, int] = {}
        self.failed = False
        self.board: Any = None
        self.profiler: torch.profiler.profile | None = None

    def report(self, step: int) -> None:
        """One line after `step`, and one record per step since the last one.

        Raises:
            FloatingPointError: a loss or a gradient norm is no number. It is raised on all ranks.
        """
        steps, self.steps = self.steps, []
        losses, norms, shares = gather(steps)
        seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
        records, numbers = list[dict[str, Any]](), range(step - len(steps) + 1, step + 1)
        for number, loss, norm, one in zip(numbers, losses, norms, steps, strict=True):
            if not (isfinite(loss) and isfinite(norm)):
                raise FloatingPointError(
                    f"step {number}: loss {loss}, gradient norm {norm}. Nothing of it was saved. "
                    f"Lower lr (now {self.settings.lr}) or clip, or look at the data."
                )
            records.append({"step": number, "loss": loss, "grad_norm": norm, "lr": one.rate, "world": len(self.names)})
        if dist.get_rank() == 0:
            speed = len(steps) * self.settings.batch * self.settings.context / seconds
            records[-1] |= {"time": time.time(), "tokens_per_second": speed}
            if self.peak_tokens:
                records[-1]["mfu"] = speed / self.peak_tokens
            self.write(records)
            self._say_line(records[-1], seconds / len(steps))
            for sentence in slow_ranks(self.slow_for, shares, self.names, steps=len(steps)):
                say(sentence)

    def _say_line(self, last: Mapping[str, Any], seconds_per_step: float) -> None:
        left = int((self.settings.steps - last["step"]) * seconds_per_step)
        mfu = f"  MFU {last['mfu']:.1%}" if "mfu" in last else ""
        speed = last["tokens_per_second"]
        say(
            f"step {last['step']}/{self.settings.steps}  loss {last['loss']:.4f} nats/token  "
            f"{speed:,.0f} tokens/s ({speed / last['world']:,.0f} per rank){mfu}  "
            f"grad norm {last['grad_norm']:.2f}  lr {last['lr']:.1e}  ETA {left // 60}m{left % 60:02d}s"
        )

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends one JSON object a line; numbers but for `step` and `time` go to TensorBoard as well."""
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            if importlib.util.find_spec("tensorboard"):
                self._write_events(records)
        except OSError as error:
            if not self.failed:
                say(f"metrics cannot be written to {self.path}: {error.strerror}. Training goes on without.")
            self.failed = True

    def _write_events(self, records: Sequence[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that an earlier start did too are hidden.
        self.board = self.board or SummaryWriter(self.path.with_name("tensorboard"), purge_step=records[0]["step"])
        for record in records:
            for name in record.keys() - {"step", "time"}:
                self.board.add_scalar(name, record[name], record["step"])
        self.board.flush()  # nobody cleans up at the end, see settings.leave

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

    def draw(self) -> None:
        """Writes loss.png, where Pillow is: it comes with tensorboard."""
        records = self.read()
        trained = {step: record["loss"] for step, record in sorted(records.items()) if "loss" in record}
        held_out = {step: record["eval_loss"] for step, record in records.items() if "eval_loss" in record}
        if trained and importlib.util.find_spec("PIL"):
            try:
                loss_picture(trained, held_out).save(self.path.with_name("loss.png"))
            except OSError as error:
                say(f"loss.png cannot be written to {self.path.parent}: {error.strerror}.")

    def trace(self, step: int) -> None:
        """Called with the number of the next step, after the last one too: traces three of every rank, on request."""
        first, last = self.settings.profile, min(self.settings.profile + PROFILED_STEPS - 1, self.settings.steps)
        wanted = 0 < first <= step <= last
        if wanted and not self.profiler:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.profiler and not wanted:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.path.with_name(f"trace-rank-{dist.get_rank()}.json")))
            self.profiler = None


def loss_picture(trained: Mapping[int, float], held_out: Mapping[int, float]) -> "Image":
    """Loss in nats per token by step: a line for training, which must not be empty, dots for held-out text."""
    from PIL import Image, ImageDraw

    losses = [*trained.values(), *held_out.values()]
    low, high, first, last = min(losses), max(losses), min(trained), max(trained)
    left, right, top, bottom = 60, 700, 20, 360
    image = Image.new("RGB", (720, 400), "white")
    pen = ImageDraw.Draw(image)

    def place(step: float, loss: float) -> tuple[float, float]:
        across, up = (step - first) / max(last - first, 1), (loss - low) / max(high - low, 1e-6)
        return left + (right - left) * across, bottom - (bottom - top) * up

    for part in range(5):
        step, loss = first + (last - first) * part // 4, low + (high - low) * part / 4
        x, y = place(step, loss)
        pen.line([left, y, right, y], "lightgray")
        pen.text((left - 8, y), f"{loss:.2f}", "black", anchor="rm")
        pen.text((x, bottom + 10), str(step), "black", anchor="mt")
    pen.line([place(*point) for point in sorted(trained.items())], "steelblue", width=2)
    for x, y in (place(*point) for point in held_out.items()):
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], "firebrick")
    return image
