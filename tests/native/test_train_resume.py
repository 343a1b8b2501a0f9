"""Whatever dies, whenever: the next start goes on with the losses of a run that was never interrupted.

Ten times here; cluster/test_training_kills.py goes on with containers, engines and machines.
"""

import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from tests.moments import moments
from tests.native.ports import free_port
from tests.native.training import Agent, complete, losses, records, torchrun, train, until, worker_codes

STEPS, INTERVAL = 400, 5
FLAGS = f"--steps {STEPS} --checkpoint-every {INTERVAL}"
MOMENTS = moments()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a run of two ranks that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("reference")
    code, text = train(run_dir, f"--steps {STEPS} --checkpoint-every 0")
    assert code == 0, text
    assert sorted(losses(run_dir)) == list(range(1, STEPS + 1))
    return losses(run_dir)


def _interrupt(agent: Agent, how: str) -> None:
    ranks = agent.ranks()
    if how == "kill a rank":
        MOMENTS.choice(ranks).send_signal(signal.SIGKILL)
    elif how == "kill all ranks":
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
    elif how == "kill the node":
        agent.kill_all()
    elif how == "stop a rank":
        MOMENTS.choice(ranks).send_signal(signal.SIGTERM)
    else:
        agent.process.send_signal(signal.SIGTERM)
    agent.wait(60)


def _run_until_interrupted(run_dir: Path, *, target: int, how: str, in_a_save: bool, nproc: int) -> str:
    with torchrun(run_dir, FLAGS, nproc=nproc) as agent:
        until(lambda: max(losses(run_dir), default=0) >= target, [agent], what=f"step {target}")
        if in_a_save:
            saved = max(complete(run_dir), default=0)
            until(lambda: any(_torn(run_dir, saved)), [agent], what="a save that has begun")
        _interrupt(agent, how)
        return agent.text()


def _torn(run_dir: Path, after: int) -> list[Path]:
    folders = run_dir.glob("checkpoints/step-????????")
    return [f for f in folders if int(f.name[5:]) > after and not (f / ".metadata").exists()]


def _steps_done_twice(run_dir: Path) -> list[int]:
    """For each resume, how many steps it had to do again."""
    steps = [record["step"] for record in records(run_dir)]
    return [before - after + 1 for before, after in pairwise(steps) if after <= before]


HOWS = ("kill a rank", "kill all ranks", "kill the node", "stop a rank", "stop torchrun")


def test_six_interruptions_of_two_ranks_change_no_loss_by_a_bit(tmp_path: Path, reference: dict[int, float]) -> None:
    target = 0
    for number in range(6):
        target = max(losses(tmp_path), default=0) + MOMENTS.randint(1, 20)
        how = HOWS[number % len(HOWS)]
        text = _run_until_interrupted(tmp_path, target=target, how=how, in_a_save=number % 4 == 1, nproc=2)
        if how.startswith("stop"):
            assert "stopped by signal 15 after step" in text
            assert max(losses(tmp_path)) == max(complete(tmp_path)), text
    code, text = train(tmp_path, FLAGS)
    assert code == 0, text
    assert losses(tmp_path) == reference
    wrong = [record for record in records(tmp_path) if record["loss"] != reference[record["step"]]]
    assert not wrong, "a loss that was written and later overwritten differs as well"
    # One interval, and what was done while a save was under way: never beyond the next save, which waits for it.
    assert all(again <= 2 * INTERVAL for again in _steps_done_twice(tmp_path)), _steps_done_twice(tmp_path)


def test_four_interruptions_with_one_to_four_ranks_change_losses_by_rounding_only(
    tmp_path: Path, reference: dict[int, float]
) -> None:
    worlds = [1, 3, 2, 4]
    for number, nproc in enumerate(worlds):
        target = max(losses(tmp_path), default=0) + MOMENTS.randint(1, 20)
        how = HOWS[number % len(HOWS)]
        _run_until_interrupted(tmp_path, target=target, how=how, in_a_save=number % 4 == 2, nproc=nproc)
    code, text = train(tmp_path, FLAGS, nproc=2)
    assert code == 0, text
    assert {record["world"] for record in records(tmp_path)} == {1, 2, 3, 4}
    assert losses(tmp_path) == pytest.approx(reference, rel=1e-3)


def test_three_ranks_resume_with_the_same_bits(tmp_path: Path) -> None:
    assert train(tmp_path, "--steps 12 --checkpoint-every 6 --profile 0", nproc=3)[0] == 0
    shutil.rmtree(tmp_path / "checkpoints/step-00000012")
    assert train(tmp_path, "--steps 12 --checkpoint-every 6", nproc=3)[0] == 0
    assert [record["step"] for record in records(tmp_path)] == [*range(1, 13), *range(7, 13)]
    whole, again = records(tmp_path)[6:12], records(tmp_path)[12:]
    assert [record["loss"] for record in again] == [record["loss"] for record in whole]


def test_shares_as_uneven_as_they_come_change_losses_by_rounding_only(tmp_path: Path) -> None:
    """Four sequences one by one on three ranks: two ranks have none for the second round, one has none to evaluate."""
    flags = "--steps 4 --batch 4 --micro-batch 1 --eval-every 2 --eval-sequences 2"
    for nproc in (1, 3):
        code, text = train(tmp_path / str(nproc), flags, nproc=nproc)
        assert code == 0, text
        assert text.count("held-out loss") == 2
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


def test_a_node_that_lost_its_disk_is_fed_by_the_other_even_if_it_is_node_0(
    tmp_path: Path, reference: dict[int, float]
) -> None:
    """Two agents, each with a run folder of its own, as two machines without shared storage."""
    folders = [tmp_path / "node0", tmp_path / "node1"]

    def both_until(target: int) -> None:
        port = free_port()
        with (
            torchrun(folders[0], FLAGS, nproc=1, nodes=2, node=0, port=port) as zero,
            torchrun(folders[1], FLAGS, nproc=1, nodes=2, node=1, port=port) as one,
        ):
            agents = [zero, one]
            until(lambda: max(losses(folders[0]), default=0) >= target, agents, what=f"step {target}")
            until(lambda: all(complete(folder) for folder in folders), agents, what="a checkpoint on each disk")
            for agent in agents:
                agent.kill_all()
            assert all(agent.process.returncode != 0 for agent in agents)

    both_until(12)
    saved = complete(folders[1])[-1]
    shutil.rmtree(folders[0] / "checkpoints")
    both_until(30)
    done = [record["step"] for record in records(folders[0])]
    resumed_at = next(after for before, after in pairwise(done) if after <= before)
    assert resumed_at == saved + 1, "node 0 did not go on from what node 1 had"
    shutil.rmtree(folders[1] / "checkpoints")
    both_until(50)
    assert losses(folders[0]) == {step: reference[step] for step in losses(folders[0])}
    assert not [r for r in records(folders[0]) if r["loss"] != reference[r["step"]]]


def test_sigterm_to_one_rank_ends_all_with_143_after_a_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    with torchrun(tmp_path, "--steps 100000 --checkpoint-every 0") as agent:
        until(lambda: max(losses(tmp_path), default=0) >= 3, [agent], what="step 3")
        agent.ranks()[1].send_signal(signal.SIGTERM)
        assert agent.wait(60) == 1, "torchrun itself knows 0 and 1 only"
        text = agent.text()
    assert worker_codes(text) == {143}, text
    assert complete(tmp_path) == [max(losses(tmp_path))]
