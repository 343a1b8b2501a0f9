"""What a run tells: the schedule, slow ranks, peak figures, and the picture of the loss."""

from pathlib import Path

import pytest
import torch
from PIL import ImageColor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from app.train.metrics import Metrics, loss_picture, peak_flops, slow_ranks
from app.train.model import GPT, learning_rate, uses_bf16
from app.train.settings import TrainSettings

FAST, SLOW, WAITING = (0.01, 0.1, 0.1), (0.01, 0.2, 0.0), (0.0, 0.1, 0.11)


def test_the_rate_warms_up_and_falls_to_its_floor() -> None:
    settings = TrainSettings(steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == max(rates) == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_rank_is_named_after_thirty_slow_steps_once() -> None:
    slow_for, names = dict[int, int](), ["rank 0", "rank 1", "rank 2"]
    told = [slow_ranks(slow_for, [FAST, SLOW, WAITING], names, steps=10) for _ in range(5)]
    assert [len(sentences) for sentences in told] == [0, 0, 1, 0, 0]
    assert told[2][0].startswith("slow: rank 1 takes 1.9 times the median")
    assert "5% data, 95% compute, 0% waiting" in told[2][0]


def test_a_rank_that_recovers_is_not_named() -> None:
    slow_for, names = dict[int, int](), ["rank 0", "rank 1"]
    for shares in [[FAST, SLOW], [FAST, SLOW], [FAST, FAST], [FAST, SLOW], [FAST, SLOW]]:
        assert not slow_ranks(slow_for, shares, names, steps=10)


@pytest.mark.parametrize(
    ("usual", "odd"),
    [
        # 1.9 times the work of the others, in a step that is 96 % waiting.
        ((0.0, 0.016, 0.984), (0.0, 0.03, 0.97)),
        # Its own figures say that it waits for others.
        ((0.0, 0.1, 0.1), (0.0, 0.2, 0.3)),
        ((0.0, 0.1, 0.02), (0.0, 0.12, 0.0)),
    ],
)
def test_a_surplus_that_makes_no_step_longer_is_not_told(
    usual: tuple[float, float, float], odd: tuple[float, float, float]
) -> None:
    slow_for, names = dict[int, int](), ["rank 0", "rank 1", "rank 2"]
    assert not any(slow_ranks(slow_for, [usual, odd, usual], names, steps=10) for _ in range(9))


def test_one_rank_alone_is_never_slow() -> None:
    slow_for = dict[int, int]()
    assert not any(slow_ranks(slow_for, [SLOW], ["rank 0"], steps=10) for _ in range(5))


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12)],
)
def test_known_devices_have_a_peak(name: str, peak: float) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize("name", ["cpu", "NVIDIA L40", "Some GPU of 2030", ""])
def test_unknown_devices_have_none(name: str) -> None:
    assert peak_flops(name) is None


def test_the_picture_shows_both_losses() -> None:
    picture = loss_picture({step: 5 / step for step in range(1, 50)}, {25: 1.0})
    colours = {colour for _, colour in picture.getcolors(1 << 20) or ()}
    assert {ImageColor.getrgb("steelblue"), ImageColor.getrgb("firebrick")} <= colours


def test_a_picture_of_one_step_can_be_drawn() -> None:
    assert loss_picture({7: 3.0}, {}).size == (720, 400)


@pytest.mark.parametrize(("precision", "used"), [("auto", False), ("bf16", True), ("fp32", False)])
def test_a_gpu_that_only_emulates_bf16_uses_it_when_asked(
    precision: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert uses_bf16(precision, torch.device("cuda")) is used
    assert uses_bf16(precision, torch.device("cpu")) is used


def test_steps_that_are_done_again_are_in_the_events_once(tmp_path: Path) -> None:
    for first, last in ((1, 5), (3, 6)):
        metrics = Metrics(TrainSettings(run_dir=str(tmp_path)), ["rank 0"], "", 1)
        metrics.write([{"step": step, "loss": float(first)} for step in range(first, last + 1)])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0), (5, 3.0), (6, 3.0)]


def test_no_token_sees_the_future() -> None:
    torch.manual_seed(0)
    model, text = GPT(vocab=50, context=16, layers=2, heads=2, width=16), torch.randint(0, 50, (1, 16))
    changed = text.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 50
    before, after = model(text), model(changed)
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.equal(before[0, 10:], after[0, 10:])


def test_a_micro_batch_without_sequences_has_no_loss_and_moves_nothing() -> None:
    """Ranks accumulate equally often, so one whose share is a sequence smaller may have nothing left to add."""
    model, nothing = GPT(vocab=50, context=16, layers=1, heads=2, width=16), torch.empty(0, 16, dtype=torch.int64)
    loss = model(nothing, nothing)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())
