"""TrainSettings of the training script: flag over variable over default, and mistakes by name."""

import subprocess
import sys
from dataclasses import fields

import pytest

from app.train.loop import connect
from app.train.settings import TrainError, TrainSettings, read_settings


def test_a_flag_wins_over_its_variable_and_that_over_the_default() -> None:
    assert read_settings([], {}).steps == TrainSettings().steps
    assert read_settings([], {"TRAIN_STEPS": "7"}).steps == 7
    assert read_settings(["--steps", "9"], {"TRAIN_STEPS": "7"}).steps == 9


def test_an_empty_variable_is_unset() -> None:
    assert read_settings([], {"TRAIN_STEPS": "", "DATA": "", "RUN_DIR": ""}) == TrainSettings()


def test_the_folders_come_from_the_launchers_variables() -> None:
    settings = read_settings([], {"RUN_DIR": "/runs/a", "DATA": "/data"})
    assert (str(settings.checkpoints), settings.data) == ("/runs/a/checkpoints", "/data")
    assert str(read_settings([], {"RUN_DIR": "/runs/a", "CHECKPOINT_DIR": "/shared"}).checkpoints) == "/shared"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_switches_take_true_and_false(text: str, value: bool) -> None:
    assert read_settings([], {"TRAIN_COMPILE": text}).compile is value
    assert read_settings(["--compile"], {}).compile


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        ([], {"TRAIN_STEP": "4"}, "TRAIN_STEP=4: there is no such setting. Did you mean TRAIN_STEPS?"),
        ([], {"TRAIN_LR": "fast"}, "TRAIN_LR=fast: expected a number, at least 0."),
        (["--steps", "1.5"], {}, "--steps 1.5: expected a whole number, at least 1."),
        ([], {"TRAIN_SHARDING": "zero"}, "TRAIN_SHARDING=zero: expected one of ddp, fsdp."),
        ([], {"TRAIN_COMPILE": "maybe"}, "TRAIN_COMPILE=maybe: expected one of true, false, 1, 0."),
        (["--batch", "0"], {}, "--batch 0: expected a whole number, at least 1."),
        (["--lr", "nan"], {}, "--lr nan: expected a number, at least 0."),
        (["--width", "100", "--heads", "3"], {}, "width=100 is not a multiple of heads=3"),
        (["--step", "3"], {}, "unrecognized arguments: --step 3"),
    ],
)
def test_a_mistake_is_refused_by_name_value_and_cure(argv: list[str], environ: dict[str, str], message: str) -> None:
    with pytest.raises(TrainError) as error:
        read_settings(argv, environ)
    assert message in str(error.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(TrainError) as error:
        read_settings([], {"TRAIN_STEPS": "x", "TRAIN_BATCH": "y", "TRAIN_SEDE": "1"})
    assert len(str(error.value).splitlines()) == 3


def test_the_launchers_variables_pass() -> None:
    read_settings([], {"TRAIN_SCRIPT": "my.py", "TRAIN_ARGS": "--x"})


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_of_a_node_with_too_few_gpus_says_so(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has a GPU too: of several ranks that are refused only the first is heard."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("os.environ", {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(TrainError, match="2 ranks need a GPU each and there are 1: lower NPROC_PER_NODE"):
        connect(TrainSettings())


def test_help_names_every_setting_and_needs_no_torch() -> None:
    """The imported modules show that a wrong setting does not wait for torch either."""
    code = "import runpy, sys; sys.argv = ['x', '--help']; runpy.run_module('app.train', run_name='__main__')"
    shown = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert all(f"--{item.name.replace('_', '-')}" in shown.stdout for item in fields(TrainSettings))
    assert "TRAIN_STEPS=200" in shown.stdout
    assert "| torch" not in shown.stderr
