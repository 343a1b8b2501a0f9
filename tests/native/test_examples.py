"""Each recipe of examples/ trains on two nodes, loses a rank to SIGKILL, and every rank resumes at the same step.

Those that need more than torch run where their packages are: in the project's own environment they are skipped.
"""

import re
import shutil
import signal
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.native.launchers import Launcher, nodes

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {
    "ddp": "",
    "fsdp2": "",
    "gpt": "",
    "hf-trainer": "transformers",
    "trl-sft": "trl",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "hydra": "hydra",
}
DETERMINISTIC = ("ddp", "fsdp2", "gpt", "hydra")
"""Their batches are functions of the step, so that an interruption leaves no trace in the losses."""
BEGINS = re.compile(r"rank (\d) begins at (?:epoch|step|iter) (\d+)")
LOSS = re.compile(r"rank (\d) (?:epoch|step|iter) (\d+) (?:loss )?(\S.*)")


def test_every_example_is_listed_here() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("*/train.py")} == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_recipe_resumes_on_all_ranks_after_a_rank_was_killed(name: str, tmp_path: Path) -> None:
    if PACKAGES[name] and not find_spec(PACKAGES[name]):
        pytest.skip(f"needs {PACKAGES[name]}")
    script, checkpoints = (EXAMPLES / name / "train.py").read_text(), tmp_path / "checkpoints"
    settings = {"NPROC_PER_NODE": "2", "CHECKPOINT_DIR": str(checkpoints), "EPOCHS": "60", "STEPS": "60"}
    with nodes(tmp_path, 2, script, **settings, PAUSE="0.1") as job:
        launchers = job.start_all()
        # By then there are two checkpoints, whatever the recipe's interval is.
        launchers[1].wait_for(r"rank 2 (?:epoch|step|iter) 2[1-9]", 120)
        victim = next(each for each in launchers[1].workers() if "script.py" in " ".join(each.cmdline()))
        victim.send_signal(signal.SIGKILL)
        assert [launcher.end(120) for launcher in launchers] == [0, 0], "\n".join(each.text for each in launchers)
    begun = resumed(launchers)
    assert set(begun) == {"0", "1", "2", "3"}
    assert len(set(begun.values())) == 1
    assert int(begun["0"]) > 0
    if name in DETERMINISTIC:
        for leftover in (*tmp_path.glob("snapshot.pt"), *tmp_path.glob("out/ckpt.pt")):
            leftover.unlink()
        shutil.move(checkpoints, tmp_path / "interrupted")
        with nodes(tmp_path, 2, script, **settings, RUN_NAME="whole") as job:
            whole = job.start_all()
            assert [launcher.end(120) for launcher in whole] == [0, 0]
        assert losses(launchers) == losses(whole)


def resumed(launchers: Iterable[Launcher]) -> dict[str, str]:
    """Where each rank began for the last time."""
    return {rank: step for launcher in launchers for rank, step in BEGINS.findall(launcher.text)}


def losses(launchers: Iterable[Launcher]) -> dict[tuple[str, str], str]:
    """What each rank said last of each step."""
    return {(rank, step): loss for launcher in launchers for rank, step, loss in LOSS.findall(launcher.text)}
