"""The bad day of a training run: each fault is one sentence, and nothing that was good is destroyed."""

import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.ports import free_port
from tests.native.training import ROOT, TINY, complete, losses, torchrun, train, until, worker_codes


@contextlib.contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A small file system in memory; needs root, as the cluster tests do."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one rank, with checkpoints of steps 6 and 9."""
    run_dir = tmp_path_factory.mktemp("finished")
    code, text = train(run_dir, "--steps 9 --checkpoint-every 3", nproc=1)
    assert code == 0, text
    assert complete(run_dir) == [6, 9], "keep=2"
    return run_dir


def _copy(finished: Path, to: Path) -> Path:
    return Path(shutil.copytree(finished / "checkpoints", to / "checkpoints")).parent


@pytest.mark.parametrize("room", ["too little", "too little for what comes with the tensors"])
def test_a_full_disk_costs_the_save_and_not_the_run_nor_an_older_checkpoint(
    tmp_path: Path, finished: Path, room: str
) -> None:
    size = sum(path.stat().st_size for path in (finished / "checkpoints/step-00000009").iterdir())
    with _mounted(tmp_path / "disk", "size=4m") as disk:
        shutil.copytree(finished / "checkpoints", disk / "checkpoints")
        with (disk / "filler").open("wb") as filler:
            filler.write(bytes(shutil.disk_usage(disk).free - (size // 2 if room == "too little" else size * 9 // 10)))
        before = _contents(disk / "checkpoints")
        environ = {"CHECKPOINT_DIR": str(disk / "checkpoints")}
        code, text = train(tmp_path, "--steps 14 --checkpoint-every 3", nproc=1, environ=environ)
        assert worker_codes(text) == {1}, "the last weights are nowhere, so the run has not succeeded"
        assert "the checkpoint of step 12 could not be saved" in text
        assert "Training goes on; the last good one here: step 9" in text
        assert max(losses(tmp_path)) == 14
        assert _contents(disk / "checkpoints") == before
        (disk / "filler").unlink()
        code, text = train(tmp_path, "--steps 14 --checkpoint-every 3", nproc=1, environ=environ)
        assert (code, "resumed after step 9; 5 logged steps are done again" in text) == (0, True), text


def test_two_ranks_whose_one_disk_lacks_the_last_weights_have_not_succeeded(tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "size=64k") as disk:
        code, text = train(tmp_path, "--steps 2", environ={"CHECKPOINT_DIR": str(disk)})
    assert "the checkpoint of step 2 could not be saved" in text
    assert (code, worker_codes(text)) == (1, {1})


@pytest.mark.parametrize("variable", ["CHECKPOINT_DIR", "RUN_DIR"])
def test_a_read_only_folder_is_refused_before_the_first_step(tmp_path: Path, variable: str) -> None:
    with _mounted(tmp_path / "disk", "ro") as disk:
        _, text = train(tmp_path, "--steps 3", environ={variable: str(disk / "there")})
    assert worker_codes(text) == {2} or worker_codes(text) == {2, -15}
    assert re.search(rf"{variable}=\S+/there cannot be written: Read-only file system \(user id \d+\)", text)
    assert "Traceback" not in text.split("Sending process")[0]
    assert not losses(tmp_path)


def test_a_torn_newest_checkpoint_is_set_aside_and_the_one_before_used(tmp_path: Path, finished: Path) -> None:
    run_dir = _copy(finished, tmp_path)
    with (run_dir / "checkpoints/step-00000009/__0_0.distcp").open("r+b") as file:
        file.truncate(1000)
    code, text = train(run_dir, "--steps 10 --checkpoint-every 3")
    assert code == 0, text
    assert re.search(r"step-00000009 cannot be read: .+ Trying the one before", text)
    assert "resumed after step 6" in text
    assert len(list(run_dir.glob("checkpoints/step-00000009.unreadable-*/__0_0.distcp"))) == 1, "kept for a look"
    assert complete(run_dir) == [9, 10]


def test_when_no_checkpoint_can_be_read_nothing_is_begun_anew(tmp_path: Path, finished: Path) -> None:
    run_dir = _copy(finished, tmp_path)
    for file in run_dir.glob("checkpoints/*/__0_0.distcp"):
        file.write_bytes(b"")
    before = _contents(run_dir / "checkpoints")
    _, text = train(run_dir, "--steps 10", nproc=1)
    assert worker_codes(text) == {2}
    assert "can be used, of steps [6, 9]. Nothing was changed." in text
    assert _contents(run_dir / "checkpoints") == before


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--width 64", "this model's is ("),
        ("--layers 2", "its model.blocks.1."),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_untouched(
    tmp_path: Path, finished: Path, flags: str, difference: str
) -> None:
    run_dir = _copy(finished, tmp_path)
    before = _contents(run_dir / "checkpoints")
    _, text = train(run_dir, f"--steps 10 {flags}")
    assert 2 in worker_codes(text)
    assert "is a checkpoint of another model" in text
    assert difference in text
    assert "choose another RUN_NAME" in text
    assert _contents(run_dir / "checkpoints") == before


def test_a_wrong_setting_ends_every_rank_with_2_and_one_message(tmp_path: Path) -> None:
    _, text = train(tmp_path, "--steps 3", environ={"TRAIN_STEPS": "", "TRAIN_LAYER": "4"})
    assert text.count("TRAIN_LAYER=4: there is no such setting. Did you mean TRAIN_LAYERS?") == 1
    assert 2 in worker_codes(text)


def test_token_files_that_need_a_larger_vocabulary_are_refused_by_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokens.bin").write_bytes(bytes([0, 1]) * 2000)
    _, text = train(tmp_path, f"--steps 3 --data {tmp_path / 'tokens.bin'}")
    assert worker_codes(text) == {2}
    assert "DATA has a token 256, vocab is 256: raise TRAIN_VOCAB." in text
    assert "Traceback" not in text.split("Sending process")[0]


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    _, text = train(tmp_path, "--steps 50 --checkpoint-every 1 --keep 9 --lr 1e30 --warmup 4 --log-every 25")
    assert 1 in worker_codes(text)
    step = re.search(r"step (\d+): loss \S*(?:nan|inf)\S*, gradient norm \S+ Nothing of it was saved", text)
    assert step, text
    assert "Lower lr (now 1e+30)" in text
    assert all(saved < int(step[1]) for saved in complete(tmp_path))


def test_nodes_with_other_data_are_told_apart(tmp_path: Path) -> None:
    text_files = [tmp_path / "text0.txt", tmp_path / "text1.txt"]
    for number, file in enumerate(text_files):
        file.write_text(f"some text, version {number}. " * 200)
    port = free_port()
    with (
        torchrun(tmp_path / "0", f"--data {text_files[0]}", nproc=1, nodes=2, node=0, port=port) as zero,
        torchrun(tmp_path / "1", f"--data {text_files[1]}", nproc=1, nodes=2, node=1, port=port) as one,
    ):
        zero.wait(), one.wait()
        text = zero.text() + one.text()
    assert len(re.findall(r"node 1 \(\S+\): rank 1: corpus is", text)) >= 2, "both nodes say which one differs"
    assert re.search(r"corpus is [0-9a-f]{16}, on rank 0 it is [0-9a-f]{16}. Make them equal.", text)


def test_sharded_training_without_shared_storage_is_refused_at_the_start(tmp_path: Path) -> None:
    port, flags = free_port(), "--sharding fsdp --steps 3"
    with (
        torchrun(tmp_path / "0", flags, nproc=1, nodes=2, node=0, port=port) as zero,
        torchrun(tmp_path / "1", flags, nproc=1, nodes=2, node=1, port=port) as one,
    ):
        zero.wait(), one.wait()
        texts = zero.text(), one.text()
    assert all("ranks [1] do not see what rank 0 wrote" in text for text in texts)
    assert not losses(tmp_path / "0")


def test_copied_and_sharded_training_have_the_same_losses_and_resume_each_other(tmp_path: Path) -> None:
    mixed, whole = tmp_path / "mixed", tmp_path / "whole"
    for steps, sharding in ((4, "ddp"), (8, "fsdp"), (12, "ddp")):
        code, text = train(mixed, f"--steps {steps} --sharding {sharding} --warmup 0 --lr 1e-3 --min-lr 1")
        assert code == 0, text
    assert train(whole, "--steps 12 --warmup 0 --lr 1e-3 --min-lr 1")[0] == 0
    assert losses(mixed) == pytest.approx(losses(whole), rel=1e-4)


def test_a_run_tells_its_devices_and_leaves_metrics_a_picture_and_a_sample(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/own.txt").write_text("The user's own text, many times over. " * 300)
    flags = f"--steps 8 --eval-every 4 --eval-sequences 7 --sample 20 --profile 3 --data {tmp_path / 'data'}"
    code, text = train(tmp_path, flags, nproc=3)
    assert code == 0, text
    for rank in range(3):
        assert re.search(rf"rank {rank} of 3, local rank {rank}, node 0 \(.+\), device cpu", text)
    assert len(re.findall(r"step [48]/8  held-out loss \d\.\d{4} nats/token", text)) == 2
    assert re.search(
        r"step 8/8  loss [\d.]+ nats/token  [\d,]+ tokens/s \([\d,]+ per rank\)  grad norm .+ ETA 0m00s", text
    )
    assert "a sample:\ndef " in text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.glob("trace-rank-*.json")) == [
        f"trace-rank-{r}.json" for r in range(3)
    ]


def test_a_trace_that_the_end_cuts_short_is_written(tmp_path: Path) -> None:
    code, text = train(tmp_path, "--steps 3 --profile 3", nproc=1)
    assert code == 0, text
    assert "traceEvents" in (tmp_path / "trace-rank-0.json").read_text()


def test_it_runs_under_plain_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "app.train"]
    command += [*TINY.split(), "--steps", "2", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2" in done.stdout
    assert sorted(losses(tmp_path)) == [1, 2]


def test_it_runs_without_torchrun_as_one_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app.train", *TINY.split(), "--steps", "2", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 1" in done.stdout


def test_a_rank_that_is_held_up_is_named(tmp_path: Path) -> None:
    flags = "--steps 100000 --checkpoint-every 0 --log-every 10"
    with torchrun(tmp_path, flags) as agent:
        until(lambda: max(losses(tmp_path), default=0) >= 20, [agent], what="step 20")
        victim = agent.ranks()[1]

        def named() -> bool:
            victim.suspend()
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.process.wait(0.03)
            victim.resume()
            return "slow: rank 1 on node 0" in agent.text()

        until(named, [agent], what="the sentence about rank 1")
        assert "slow: rank 0" not in agent.text()
