"""Two launchers with a CHECKPOINT_DIR each: whatever is saved on one node, both resume from the same step."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.gang.mirror.disk import Disk
from app.gang.mirror.manifest import pack_manifest
from app.gang.mirror.transfer import Server, exchange_key
from tests.moments import moments
from tests.native.launchers import PROJECT, Launcher, Nodes, nodes

TUTORIAL = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), os.environ["CHECKPOINT_DIR"]
path, last = os.path.join(folder, "snapshot.pt"), int(sys.argv[1])
start = torch.load(path)["epoch"] if os.path.exists(path) else 0
print(f"rank {rank} begins at {start}", flush=True)
for epoch in range(start, last):
    dist.all_reduce(torch.ones(1))
    if rank == 0:
        torch.save({"epoch": epoch + 1}, path + ".tmp")
        os.replace(path + ".tmp", path)
    time.sleep(0.05)
dist.barrier()
dist.destroy_process_group()
"""
"""Rank 0 alone saves, all ranks load, as the tutorials do."""

SCATTERED = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, world, folder = dist.get_rank(), dist.get_world_size(), os.environ["CHECKPOINT_DIR"]
found = [int(name.split("-")[1]) for name in os.listdir(folder) if name.startswith("checkpoint-")]
start = max(found, default=0)
if start:
    where = os.path.join(folder, f"checkpoint-{start}")
    assert torch.load(os.path.join(where, "model.pt")) == start
    for other in range(world):
        assert torch.load(os.path.join(where, f"rng_state_{other}.pth")) == (other, start)
print(f"rank {rank} begins at {start}", flush=True)
for step in range(start + 1, int(sys.argv[1]) + 1):
    dist.all_reduce(torch.ones(1))
    if step % 5 == 0:
        where = os.path.join(folder, f"checkpoint-{step}")
        os.makedirs(where, exist_ok=True)
        if rank == 0:
            torch.save(step, os.path.join(where, "model.pt"))
        torch.save((rank, step), os.path.join(where, f"rng_state_{rank}.pth"))
        dist.barrier()
    time.sleep(0.02)
dist.barrier()
dist.destroy_process_group()
"""
"""As Hugging Face's Trainer: the model by rank 0, a state of every rank beside it on the rank's own node."""


def folder(job: Nodes, node: int) -> Path:
    return job.folder / f"node{node}" / "default" / "checkpoints"


def begins(launchers: list[Launcher]) -> list[int]:
    """Where the ranks began, of nodes that have all ended."""
    return [int(found) for one in launchers for found in re.findall(r"rank \d+ begins at (\d+)", one.text)]


def run(job: Nodes, *arguments: str) -> list[Launcher]:
    launchers = job.start_all(*arguments)
    assert [launcher.end(90) for launcher in launchers] == [0, 0], "\n".join(one.text for one in launchers)
    return launchers


def test_a_killed_rank_is_started_again_at_the_same_step_on_both_nodes(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, TUTORIAL, MAX_RESTARTS="3") as job:
        launchers = job.start_all("60")
        for launcher in launchers:
            launcher.wait_for(r"begins at 0", 60)
        wait_until((folder(job, 0) / "snapshot.pt").exists)
        time.sleep(0.5)  # some epochs more: there is no event for them
        victim = next(one for one in launchers[1].workers() if "script.py" in " ".join(one.cmdline()))
        victim.send_signal(signal.SIGKILL)
        assert [launcher.end(90) for launcher in launchers] == [0, 0], launchers[0].text
        first, second = begins(launchers[:1]), begins(launchers[1:])
        assert first == second
        assert len(first) == 2
        assert first[1] > 0


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_wiped_disk_of_node_0_and_a_torn_newest_file_are_made_good(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, TUTORIAL) as job:
        run(job, "4")
        shutil.rmtree(folder(job, 0))
        assert begins(run(job, "6")) == [4, 4], "node 1 got the last epochs when the job ended"
        shutil.rmtree(folder(job, 1).parent)
        assert begins(run(job, "9")) == [6, 6]
        snapshot = folder(job, 0) / "snapshot.pt"
        whole = snapshot.read_bytes()
        snapshot.write_bytes(whole[: len(whole) // 2])
        launchers = run(job, "10")
        assert begins(launchers) == [9, 9]
        assert any("snapshot.pt" in line and "torn" in line for line in launchers[0].said)


def test_scattered_states_come_together_and_survive_the_loss_of_a_disk(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, SCATTERED, NPROC_PER_NODE="2") as job:
        run(job, "10")
        shutil.rmtree(folder(job, 0))
        assert begins(run(job, "15")) == [10] * 4
        shutil.rmtree(folder(job, 1).parent)
        assert begins(run(job, "15")) == [15] * 4


def test_a_stopped_job_leaves_its_last_checkpoint_on_a_second_node(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, TUTORIAL) as job:
        launchers = job.start_all("100000")
        wait_until((folder(job, 0) / "snapshot.pt").exists)
        stop(launchers)
        assert (folder(job, 1) / "snapshot.pt").read_bytes() == (folder(job, 0) / "snapshot.pt").read_bytes()
        for launcher in launchers:
            assert len([line for line in launcher.said if "got snapshot.pt" in line]) == 1, launcher.text


def test_with_own_a_difference_is_said_and_nothing_is_copied(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, TUTORIAL, CHECKPOINTS="own") as job:
        run(job, "3")
        launchers = job.start_all("5")
        launchers[0].wait_for(r"rank 0 begins at 3")
        launchers[1].wait_for(r"rank 1 begins at 0")
        stop(launchers)
        assert any("node 1" in line and "CHECKPOINTS=own" in line for line in launchers[1].said)


def stop(launchers: list[Launcher]) -> None:
    for launcher in launchers:
        launcher.signal(signal.SIGTERM)
    for launcher in launchers:
        launcher.end(60)


def test_new_checkpoints_get_a_second_copy_while_the_training_runs(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, TUTORIAL.replace("if rank == 0:", "if rank == 0 and epoch < 3:")) as job:
        launchers = job.start_all("100000")
        wait_until((folder(job, 1) / "snapshot.pt").exists, 90)
        stop(launchers)
        assert (folder(job, 1) / "snapshot.pt").read_bytes() == (folder(job, 0) / "snapshot.pt").read_bytes()


TORN_IN_PLACE = """
import io, os, signal, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, path = dist.get_rank(), os.path.join(os.environ["CHECKPOINT_DIR"], "last.pt")
start = torch.load(path)["step"] if os.path.exists(path) else 0
print(f"rank {rank} begins at {start}", flush=True)
if rank == 0 and start == 0:
    torch.save({"step": 3}, path)
    while not os.path.exists("torn"):
        time.sleep(0.05)
    whole = io.BytesIO()
    torch.save({"step": 4}, whole)
    with open(path, "wb") as file:
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_save_in_place_that_was_killed_half_way_gives_way_to_the_last_whole_one(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, TORN_IN_PLACE) as job:
        launchers = job.start_all()
        wait_until((folder(job, 1) / "last.pt").exists, 90)
        (tmp_path / "torn").touch()
        assert [launcher.end(90) for launcher in launchers] == [0, 0], launchers[0].text
        assert [begins([launcher]) for launcher in launchers] == [[0, 3], [0, 3]]
        assert any("last.pt" in line and "torn" in line for line in launchers[1].said)


RECEIVER = """
import sys
from pathlib import Path
from app.gang.mirror.disk import Disk
from app.gang.mirror.plan import Bounds, plan_transfers
from app.gang.mirror.manifest import read_manifest
from app.gang.mirror.transfer import Fetcher, exchange_key
import json
folder, port, told = Path(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
disk = Disk(folder)
plan = plan_transfers({0: read_manifest(told), 1: disk.scan()}, {}, Bounds(keep=None))
print("begins", flush=True)
Fetcher(disk, "127.0.0.2", exchange_key(b"", b"nonce"), {0: ("127.0.0.1", port)}).run(plan.orders[1].fetch, 1)
"""


@pytest.mark.parametrize("in_place", [True, False], ids=["new versions", "new files"])
def test_a_transfer_killed_at_any_moment_leaves_every_file_whole(tmp_path: Path, in_place: bool) -> None:
    """Twenty moments in all. Afterwards the same transfer goes through."""
    chance = moments()
    source, copy = tmp_path / "from/checkpoints", tmp_path / "to/checkpoints"
    sizes = {"big.bin": 100 << 20, **{f"part{number}.bin": 3 << 20 for number in range(10)}}
    generations: dict[str, set[bytes]] = {name: set() for name in sizes}
    manifest = tmp_path / "manifest.json"
    for moment in range(11):
        for name, size in sizes.items():
            file = source / ("step" if in_place else f"step-{moment}") / name
            file.parent.mkdir(parents=True, exist_ok=True)
            content = bytes([moment]) * size
            file.write_bytes(content)
            generations[name].add(content)
        disk = Disk(source)
        manifest.write_text(json.dumps(pack_manifest(disk.scan())))
        server = Server(disk, "127.0.0.1", exchange_key(b"", b"nonce"))
        command = [sys.executable, "-c", RECEIVER, str(copy), str(server.port), str(manifest)]
        with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) as receiver:
            assert receiver.stdout
            receiver.stdout.readline()
            if moment < 10:
                time.sleep(chance.uniform(0.0, 0.25))
                receiver.kill()
        server.close()
        disk.close()
        for file in copy.rglob("*"):
            assert file.is_dir() or file.read_bytes() in generations[file.name], f"{file} after moment {moment}"
        if not in_place and moment < 10:
            shutil.rmtree(source / f"step-{moment}")
    assert receiver.returncode == 0
    assert {file.name for file in copy.rglob("*.bin")} == set(sizes)
    assert not [*(copy.parent / ".checkpoints.mirror/incoming").iterdir()]
