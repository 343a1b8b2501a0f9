"""What nodes without shared storage see of each other's checkpoints: the table of docs/checkpoints.md, real files."""

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.gang.mirror import transfer
from app.gang.mirror.disk import Disk
from app.gang.mirror.manifest import Entry, Manifest, Version, pack_manifest, read_manifest, safe_link, safe_path
from app.gang.mirror.node import pack_orders, read_orders
from app.gang.mirror.pages import Unpacker, pages
from app.gang.mirror.plan import SMALL, Bounds, plan_transfers
from tests.unit.mirror_bed import NOW, Bed, saved, tensors, torn

LARGE = SMALL + 1


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


def large(text: str = "x") -> bytes:
    return saved(text, pad=LARGE)


def test_what_only_rank_0_saved_is_on_every_node(tmp_path: Path) -> None:
    bed = Bed(tmp_path, count=3)
    bed.write(0, "snapshot.pt", saved())
    bed.level()
    assert bed.read(1) == bed.read(2) == bed.read(0) == {"snapshot.pt": saved()}
    assert [bed.fetched(node) for node in range(3)] == [0, 1, 1]
    bed.level()
    assert {op for _, op in bed.asked} == {"mark", "look", "scan", "close"}, "nothing listens when nothing is copied"


def test_a_copy_keeps_time_and_mode_so_that_scripts_find_the_newest(bed: Bed) -> None:
    bed.write(0, "a.pt", saved(), at=5).chmod(0o640)
    bed.level()
    status = (bed.folder(1) / "a.pt").stat()
    assert status.st_mtime == NOW + 5
    assert stat.S_IMODE(status.st_mode) == 0o640


def test_scattered_files_of_one_checkpoint_come_together(bed: Bed) -> None:
    bed.write(0, "checkpoint-50/model.safetensors", tensors())
    for rank, node in ((0, 0), (1, 0), (2, 1), (3, 1)):
        bed.write(node, f"checkpoint-50/rng_state_{rank}.pth", saved(str(rank)))
    bed.level()
    assert bed.read(0) == bed.read(1)
    assert len(bed.read(0)) == 5


def test_of_two_versions_the_newest_is_taken_and_the_older_is_kept_for_one_generation(bed: Bed) -> None:
    bed.write(0, "last.pt", saved("old"), at=0)
    bed.write(1, "last.pt", saved("newer"), at=9)
    bed.level()
    assert bed.read(0) == bed.read(1) == {"last.pt": saved("newer")}
    assert (bed.folder(0).parent / ".checkpoints.mirror/previous/last.pt").read_bytes() == saved("old")


def test_generations_of_what_a_script_deletes_go_too(bed: Bed) -> None:
    for node, at in ((0, 1), (1, 2)):
        bed.write(node, "step-1/model.pt", saved(str(node)), at=at)
    bed.level()
    kept = bed.folder(0).parent / ".checkpoints.mirror/previous/step-1/model.pt"
    assert kept.exists()
    for node in (0, 1):
        shutil.rmtree(bed.folder(node) / "step-1")
        bed.write(node, "step-2/model.pt", saved(str(node)), at=5 + node)
    bed.level()
    bed.level()
    assert not kept.exists()
    assert not kept.parent.exists()


def test_clocks_are_corrected_before_times_are_compared(bed: Bed) -> None:
    bed.clocks[1] = 60 * 10**9
    bed.write(0, "last.pt", saved("newest"), at=10)
    bed.write(1, "last.pt", saved("an hour glass"), at=50)  # 10 s before NOW by node 0's clock
    bed.level()
    assert bed.read(1) == {"last.pt": saved("newest")}


def test_equal_content_is_not_copied_and_stays_the_nodes_own(bed: Bed) -> None:
    bed.write(0, "step-1/shard.distcp", saved(), at=1)
    bed.write(1, "step-1/shard.distcp", saved(), at=2)
    bed.write(1, "step-2/shard.distcp", saved("2"), at=3)
    bed.level()
    assert bed.fetched(0) == 1
    shutil.rmtree(bed.folder(1) / "step-1")
    bed.level()
    assert "step-1/shard.distcp" in bed.names(0), "it was not brought, so it is not removed"


def test_a_folder_that_several_nodes_wrote_comes_from_the_last_to_write_there(bed: Bed) -> None:
    for node, first, last in ((0, 7, 8), (1, 1, 9)):
        bed.write(node, "step-3/shard.distcp", saved(f"node {node}"), at=first)
        bed.write(node, "step-3/.metadata", f"of node {node}", at=last)
    bed.level()
    assert bed.read(0) == bed.read(1) == {"step-3/shard.distcp": saved("node 1"), "step-3/.metadata": b"of node 1"}


def test_what_a_script_deletes_disappears_from_copies(bed: Bed) -> None:
    for step in (10, 20):
        bed.write(0, f"checkpoint-{step}/model.pt", large(), at=step)
    bed.level()
    shutil.rmtree(bed.folder(0) / "checkpoint-10")
    bed.write(0, "checkpoint-30/model.pt", large(), at=30)
    bed.level()
    assert bed.names(1) == bed.names(0) == {"checkpoint-20/model.pt", "checkpoint-30/model.pt"}
    assert not (bed.folder(1) / "checkpoint-10").exists()


def test_a_file_that_was_not_brought_is_never_removed(bed: Bed) -> None:
    bed.write(0, "checkpoint-10/model.pt", large(), at=10)
    bed.write(1, "checkpoint-10/rng_1.pth", saved(), at=10)
    bed.level()
    shutil.rmtree(bed.folder(0) / "checkpoint-10")
    bed.write(0, "checkpoint-20/model.pt", large(), at=20)
    bed.level()
    assert bed.names(1) == {"checkpoint-10/rng_1.pth", "checkpoint-20/model.pt"}
    assert bed.names(0) == {"checkpoint-20/model.pt"}, "what the script deleted there does not come back"


def test_a_copy_that_a_script_wrote_again_is_its_own(bed: Bed) -> None:
    bed.write(0, "a.pt", saved("0"), at=1)
    bed.write(0, "b.pt", saved("0"), at=1)
    bed.level()
    bed.write(1, "a.pt", saved("mine"), at=5)
    (bed.folder(0) / "a.pt").unlink()
    bed.level()
    assert bed.read(1)["a.pt"] == bed.read(0)["a.pt"] == saved("mine")


@pytest.mark.parametrize("how", ["contents", "folder", "all"])
def test_an_emptied_or_new_disk_is_filled_not_obeyed(bed: Bed, how: str) -> None:
    for step in (10, 20):
        bed.write(0, f"checkpoint-{step}/model.pt", large(str(step)), at=step)
    bed.level()
    before = bed.read(1)
    if how == "contents":
        for child in bed.folder(0).iterdir():
            shutil.rmtree(child)
    else:
        shutil.rmtree(bed.folder(0) if how == "folder" else bed.folder(0).parent)
    bed.level()
    assert bed.read(0) == bed.read(1) == before
    # Node 0 is the origin again: what it deletes goes from node 1 too.
    bed.level()
    shutil.rmtree(bed.folder(0) / "checkpoint-10")
    bed.level()
    assert bed.names(1) == {"checkpoint-20/model.pt"}


def test_a_fill_that_broke_off_is_no_deletion(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in range(4):
        bed.write(0, f"checkpoint-9/part{part}.pt", large(str(part)), at=9)
    bed.level()
    before = bed.read(1)
    shutil.rmtree(bed.folder(0) / "checkpoint-9")
    _fail_after(monkeypatch, 3)
    bed.level()
    monkeypatch.undo()
    assert len(bed.names(0)) == 3
    bed.level()
    assert bed.read(0) == bed.read(1) == before


def _fail_after(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """Lets a disk fail after it has taken some files."""
    whole, count = Disk.complete, [0]

    def complete(self: Disk, fd: int, entry: Entry) -> None:
        count[0] += 1
        if count[0] > files:
            os.close(fd)
            raise OSError(5, "Input/output error")
        whole(self, fd, entry)

    monkeypatch.setattr(Disk, "complete", complete)


def test_a_node_replaced_by_an_empty_one_gets_all(tmp_path: Path) -> None:
    bed = Bed(tmp_path, count=3)
    bed.write(1, "checkpoint-5/rank1.pt", saved("1"), at=5)
    bed.write(2, "checkpoint-5/rank2.pt", saved("2"), at=5)
    bed.level()
    shutil.rmtree(bed.folder(1).parent)
    bed.level()
    assert bed.read(0) == bed.read(1) == bed.read(2)
    assert len(bed.read(1)) == 2


def scattered(bed: Bed, step: int, *, nodes: tuple[int, ...] = (0, 1)) -> None:
    """As Trainer saves: the model by node 0, a state of every rank beside it on the rank's own node."""
    if 0 in nodes:
        bed.write(0, f"checkpoint-{step}/model.safetensors", tensors(), at=step - 10**8)
    for node in nodes:
        bed.write(node, f"checkpoint-{step}/rng_state_{node}.pth", saved(str(step)), at=step - 10**8)


@pytest.mark.parametrize("lost", [0, 1])
def test_what_a_lost_disk_has_left_incomplete_is_set_aside_for_the_last_whole_checkpoint(bed: Bed, lost: int) -> None:
    scattered(bed, 10)
    scattered(bed, 20)
    bed.level()
    scattered(bed, 30)
    bed.level(Bounds(keep=None))
    for step in (40, 50):
        scattered(bed, step)
    shutil.rmtree(bed.folder(lost).parent)
    said = bed.level()
    assert {path.partition("/")[0] for path in bed.names(0)} == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}
    assert bed.read(0) == bed.read(1)
    assert len(bed.names(0)) == 9
    aside = bed.folder(1 - lost).parent / ".checkpoints.mirror/torn"
    assert {path.name for path in aside.iterdir()} == {"checkpoint-40", "checkpoint-50"}
    assert any("checkpoint-40" in line and f"node {1 - lost}" in line for line in said)
    scattered(bed, 40)
    bed.level()
    assert bed.read(0) == bed.read(1)
    assert len(bed.names(0)) == 12


def test_while_no_disk_is_lost_an_entry_with_fewer_files_stays(bed: Bed) -> None:
    scattered(bed, 10)
    bed.level()
    scattered(bed, 20, nodes=(1,))
    bed.level()
    bed.level()
    assert "checkpoint-20/rng_state_1.pth" in bed.names(0) & bed.names(1)


def test_in_the_background_a_copy_stays_until_all_of_a_newer_one_is_here(bed: Bed) -> None:
    scattered(bed, 10)
    bed.level(background=True)
    shutil.rmtree(bed.folder(0) / "checkpoint-10")
    bed.write(0, "other/kept.bin", bytes(9 * LARGE), at=-(10**8))
    scattered(bed, 20, nodes=(1,))
    bed.level(background=True)
    assert "checkpoint-10/model.safetensors" in bed.names(1)
    scattered(bed, 20)
    bed.level(background=True)
    bed.level(background=True)
    assert "checkpoint-10/model.safetensors" not in bed.names(1)


@pytest.mark.parametrize(
    ("name", "whole", "newer"),
    [("last.pt", saved("1"), saved("22")), ("m.safetensors", tensors(b"1234"), tensors(b"5678901"))],
)
def test_a_torn_newest_version_gives_way_to_the_last_whole_one_on_all_nodes(
    bed: Bed, name: str, whole: bytes, newer: bytes
) -> None:
    bed.write(0, name, whole, at=1)
    bed.level()
    bed.write(0, name, torn(newer), at=9)
    said = bed.level()
    assert bed.read(0) == bed.read(1) == {name: whole}
    assert any(name in line and "node 0" in line for line in said)
    assert (bed.folder(0).parent / ".checkpoints.mirror/torn" / name).read_bytes() == torn(newer)
    bed.write(0, name, newer, at=12)
    bed.level()
    assert bed.read(1) == {name: newer}


def test_the_generation_before_is_put_back_when_the_copy_is_torn_as_well(bed: Bed) -> None:
    bed.write(0, "last.pt", saved("1"), at=1)
    bed.level()
    bed.write(0, "last.pt", saved("2"), at=2)
    bed.level()
    for node in (0, 1):
        bed.write(node, "last.pt", torn(saved("3")), at=3)
    bed.level()
    assert bed.read(0) == bed.read(1) == {"last.pt": saved("1")}


def test_a_torn_file_without_a_whole_version_is_said_and_left(bed: Bed) -> None:
    bed.write(0, "epoch_3.pt", torn(saved()), at=3)
    said = bed.level()
    assert bed.read(0) == {"epoch_3.pt": torn(saved())}
    assert any("epoch_3.pt" in line and line.startswith("warning") for line in said)


def test_half_written_temporary_and_hidden_entries_stay_where_they_are(bed: Bed) -> None:
    bed.write(0, "checkpoint-1/model.pt", saved(), at=1)
    for name in ("tmp-checkpoint-2/model.pt", ".staging/x.pt", "checkpoint-3.partial", "c.pt.tmp"):
        bed.write(0, name, saved(), at=9)
    bed.level()
    assert bed.names(1) == {"checkpoint-1/model.pt"}


def test_links_inside_the_folder_are_brought_and_pull_their_target_along(bed: Bed) -> None:
    for step in (1, 2, 3, 4):
        bed.write(0, f"step-{step}/model.pt", large(), at=1000 * step)
    (bed.folder(0) / "latest").symlink_to("step-4")
    (bed.folder(0) / "best").symlink_to(bed.folder(0) / "step-1")
    bed.level()
    assert bed.names(1) == {"best", "latest", "step-1/model.pt", "step-3/model.pt", "step-4/model.pt"}
    assert (bed.folder(1) / "best/model.pt").read_bytes() == large()
    assert (bed.folder(1) / "best").readlink() == Path("step-1")
    (bed.folder(0) / "latest").unlink()
    (bed.folder(0) / "latest").symlink_to("step-3")
    bed.level()
    assert (bed.folder(1) / "latest").readlink() == Path("step-3")


def test_links_out_of_the_folder_are_not_brought(bed: Bed) -> None:
    bed.write(0, "a.pt", saved())
    (bed.folder(0) / "out").symlink_to("../../secret")
    (bed.folder(0) / "abs").symlink_to("/etc/passwd")
    bed.level()
    assert bed.names(1) == {"a.pt"}


def test_nothing_is_written_through_a_link_of_the_receiver(bed: Bed, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    bed.write(0, "sub/a.pt", saved())
    bed.folder(1).mkdir(parents=True)
    (bed.folder(1) / "sub").symlink_to(elsewhere)
    said = bed.level()
    assert not [*elsewhere.iterdir()]
    assert any("node 1" in line and "sub/a.pt" in line for line in said)


def test_only_the_newest_entries_and_the_small_files_beside_them_are_brought(bed: Bed) -> None:
    for step in (1, 2, 3, 4):
        bed.write(0, f"step-{step}/model.pt", large(), at=1000 * step)
    bed.write(0, "trainer_state.json", "{}", at=1)
    said = bed.level()
    assert bed.names(1) == {"step-3/model.pt", "step-4/model.pt", "trainer_state.json"}
    assert any("MIRROR_KEEP" in line for line in said)
    bed.level(Bounds(keep=None))
    assert bed.names(1) == bed.names(0)


def test_files_that_ranks_saved_side_by_side_are_one_checkpoint(bed: Bed) -> None:
    for rank in range(4):
        bed.write(0, f"model_rank{rank}.pt", large(), at=rank)
    bed.level()
    assert len(bed.names(1)) == 4


def test_what_is_beyond_the_limit_is_said_and_not_copied(bed: Bed) -> None:
    bed.write(0, "step-1/model.pt", large("1"), at=1000)
    bed.write(0, "step-2/model.pt", bytes(3 * LARGE), at=2000)
    said = bed.level(Bounds(limit=2 * LARGE))
    assert bed.names(1) == {"step-1/model.pt"}
    assert any("step-2" in line and "MIRROR_LIMIT" in line for line in said)
    assert any("different checkpoints" in line for line in said)


def _had(path: str, size: int, at: int) -> Entry:
    return Entry(path=path, version=Version(size, at * 10**9), stored=size)


def test_500_gb_of_old_runs_are_not_copied() -> None:
    runs = {f"run-{run}/model.pt": _had(f"run-{run}/model.pt", 10**11, 1000 * run) for run in range(5)}
    nodes = {
        0: Manifest(disk="a", free=10**12, entries=runs),
        1: Manifest(disk="b", free=10**13, entries={}),
        2: Manifest(disk="c", free=10**11, entries={}),
    }
    plan = plan_transfers(nodes, {}, Bounds(limit=2 * 10**11))
    assert [one.entry.top for one in plan.orders[1].fetch] == ["run-4", "run-3"]
    assert [one.entry.top for one in plan.orders[2].fetch] == []
    kinds = {(remark.kind, remark.path, remark.ranks) for remark in plan.remarks}
    assert {("disk_full", "run-4", (2,)), ("disk_full", "run-3", (2,))} <= kinds
    assert [(remark.kind, remark.count) for remark in plan.remarks if remark.kind == "kept_out"] == [("kept_out", 3)]


def test_many_small_files_are_planned_in_seconds_and_fit_into_pages() -> None:
    entries = {path: _had(path, 4000, 5) for path in (f"step-1/shard-{number:06}.bin" for number in range(20_000))}
    nodes = {0: Manifest(disk="a", free=10**12, entries=entries), 1: Manifest(disk="b", free=10**12, entries={})}
    started = time.monotonic()
    unpacker = Unpacker()
    for page in pages(pack_manifest(nodes[0])):
        unpacker.add(page)
    nodes[0] = read_manifest(unpacker.take())
    plan = plan_transfers(nodes, {}, Bounds())
    assert len(plan.orders[1].fetch) == 20_000
    assert read_orders(json.loads(json.dumps(pack_orders(plan.orders[1])))) == plan.orders[1]
    assert time.monotonic() - started < 20


def test_a_file_of_50_gb_goes_in_parts_and_stays_sparse(bed: Bed) -> None:
    file = bed.write(0, "model.ckpt", b"begin")
    with file.open("r+b") as opened:
        opened.truncate(50 * 10**9)
        opened.seek(30 * 10**9)
        opened.write(b"middle")
    bed.level()
    copy = bed.folder(1) / "model.ckpt"
    assert copy.stat().st_size == 50 * 10**9
    assert copy.stat().st_blocks * 512 < 10**9
    with copy.open("rb") as opened:
        assert opened.read(5) == b"begin"
        opened.seek(30 * 10**9)
        assert opened.read(6) == b"middle"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB; needs root, as the tests on engines do."""
    folder = tmp_path / "node1"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=8m tmpfs {folder}"):  # noqa: S605
        pytest.skip("needs root to mount a small disk")
    yield folder
    os.system(f"umount --lazy {folder}")  # noqa: S605


def test_a_receiver_without_room_is_told_before_anything_is_copied(bed: Bed, small_disk: Path) -> None:
    bed.write(0, "step-1/model.pt", saved(pad=2 << 20), at=1000)
    bed.write(0, "step-2/model.pt", saved(pad=9 << 20), at=2000)
    said = bed.level()
    assert bed.names(1) == {"step-1/model.pt"}
    assert any("step-2" in line and "free" in line for line in said)


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half_written(bed: Bed, small_disk: Path) -> None:
    for part in range(3):
        bed.write(0, f"step-1/part{part}.pt", saved(str(part), pad=2 << 20), at=1000)

    def fill(rank: int, op: str) -> None:
        if op == "fetch":
            (small_disk / "other").write_bytes(bytes(5 << 20))

    bed.hook = fill
    said = bed.level()
    assert any("no space left" in line for line in said)
    assert all(content == bed.read(0)[path] for path, content in bed.read(1).items())
    assert not [*(small_disk / ".checkpoints.mirror/incoming").iterdir()]
    (small_disk / "other").unlink()
    bed.hook = None
    bed.level()
    assert bed.read(1) == bed.read(0)


def test_a_shared_disk_is_recognised_and_nothing_is_copied(tmp_path: Path) -> None:
    bed = Bed(tmp_path, count=3)
    bed.write(0, "a.pt", saved())
    (tmp_path / "node1").symlink_to(tmp_path / "node0")
    bed.level()
    assert (1, "fetch") not in bed.asked
    assert bed.read(2) == bed.read(1) == bed.read(0) == {"a.pt": saved()}, "node 2 has a disk of its own"
    shutil.rmtree(tmp_path / "node2")
    (tmp_path / "node2").symlink_to(tmp_path / "node0")
    said = bed.level()
    assert not said
    assert {op for _, op in bed.asked} == {"mark", "look", "scan", "close"}
    assert bed.names(0) == {"a.pt"}, "no mark is left behind"


def test_two_disks_cloned_from_one_do_not_obey_each_other(bed: Bed) -> None:
    for step in (1, 2):
        bed.write(0, f"step-{step}/model.pt", large(), at=step)
    bed.level()
    shutil.rmtree(bed.folder(1).parent)
    shutil.copytree(bed.folder(0).parent, bed.folder(1).parent)
    shutil.rmtree(bed.folder(0) / "step-1")
    bed.level()
    assert bed.names(0) == bed.names(1) == {"step-1/model.pt", "step-2/model.pt"}


def test_a_thousand_small_files_and_odd_names_arrive(bed: Bed) -> None:
    for number in range(1000):
        bed.write(0, f"shards/{number % 10}/{number}.bin", str(number))
    for name in ("with space", "ümlaut", "new\nline", "empty"):
        bed.write(0, f"shards/{name}", "" if name == "empty" else name)
    (bed.folder(0) / os.fsdecode(b"shards/not-utf8-\xff")).write_bytes(b"x")
    bed.level()
    assert bed.read(1) == bed.read(0)
    assert len(bed.read(1)) == 1005


def test_the_folder_is_made_and_nothing_but_checkpoints_is_in_it(bed: Bed) -> None:
    bed.level()
    assert not [*bed.folder(0).iterdir()], "some scripts begin anew only in an empty folder"
    assert bed.folder(1).is_dir()


def test_where_no_work_folder_can_be_beside_it_is_inside(bed: Bed) -> None:
    bed.write(0, "a.pt", saved())
    (bed.folder(1).parent).mkdir()
    (bed.folder(1).parent / ".checkpoints.mirror").write_text("a file in the way")
    bed.level()
    bed.level()
    assert bed.read(1)["a.pt"] == saved()
    assert (bed.folder(1) / ".torchrun-compose/state.json").exists()
    assert bed.names(0) == {"a.pt"}


def test_a_node_whose_folder_cannot_be_used_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    bed = Bed(tmp_path, count=3)
    bed.write(0, "a.pt", saved())
    (tmp_path / "node1").write_text("a file in the way")
    said = bed.level()
    assert bed.names(2) == {"a.pt"}
    assert any("node 1" in line for line in said)


def test_a_lost_node_ends_the_comparison_and_the_next_one_finishes_it(bed: Bed) -> None:
    for step in (1, 2):
        bed.write(0, f"step-{step}/model.pt", large(str(step)), at=step)

    def lose(rank: int, op: str) -> None:
        if op == "fetch":
            raise ConnectionResetError("lost")

    bed.hook = lose
    with pytest.raises(ConnectionResetError):
        bed.level()
    assert bed.names(1) == set()
    bed.hook = None
    bed.level()
    assert bed.read(1) == bed.read(0)


def test_with_own_folders_that_differ_each_node_is_named_and_nothing_moves(bed: Bed) -> None:
    bed.write(0, "step-2/model.pt", large(), at=2)
    bed.write(1, "step-1/model.pt", large(), at=1)
    (line,) = bed.level(own=True)
    assert "node 0 has step-2" in line
    assert "node 1 has step-1" in line
    assert bed.names(1) == {"step-1/model.pt"}
    assert bed.folder(0).parent.name == "node0"


def test_in_the_background_one_other_node_gets_what_is_whole_and_settled(tmp_path: Path) -> None:
    bed = Bed(tmp_path, count=3)
    bed.write(1, "step-1/model.pt", large(), at=-(10**8))
    bed.write(1, "step-2/model.pt", torn(large()), at=-(10**8))
    (bed.folder(1) / "step-3").mkdir()
    (bed.folder(1) / "step-3/model.txt").write_text("being written")
    bed.write(1, "last.pt", saved(), at=time.time() - NOW)
    bed.write(1, "last.txt", "may be half of it", at=time.time() - NOW)
    bed.level(background=True)
    assert bed.names(2) == {"step-1/model.pt", "last.pt"}, "a single file tells by itself that it is whole"
    assert bed.names(0) == set()


def test_in_the_background_the_last_whole_copy_outlives_its_origin_until_there_is_a_newer_one(bed: Bed) -> None:
    old = -(10**8)
    bed.write(0, "step-1/model.pt", large("1"), at=old)
    bed.write(0, "big.txt", bytes(4 * LARGE), at=old - 10**6)
    bed.level(background=True)
    shutil.rmtree(bed.folder(0) / "step-1")
    bed.level(background=True)
    assert "step-1/model.pt" in bed.names(1)
    bed.write(0, "step-2/model.pt", large("2"), at=old + 1)
    bed.level(background=True)
    bed.level(background=True)
    assert bed.names(1) == {"step-2/model.pt", "big.txt"}


def test_at_the_end_of_a_job_one_other_node_gets_what_was_written_a_moment_ago(tmp_path: Path) -> None:
    bed = Bed(tmp_path, count=3)
    bed.write(0, "step-1/weights.txt", "no format that tells", at=time.time() - NOW)
    (line,) = bed.level(last=True)
    assert "node 1" in line
    assert bed.read(1) == bed.read(0)
    assert bed.names(2) == set()
    assert not bed.level(last=True)


def test_while_it_copies_it_says_what_and_how_much(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.write(0, "model.pt", bytes(3 * transfer.FRAME))
    bed.write(0, "small.pt", saved())
    receive = transfer._receive_into

    def slowly(peer: socket.socket, room: memoryview) -> None:
        receive(peer, room)
        until = time.monotonic() + 5
        while len(room) == transfer.FRAME and not bed.said and time.monotonic() < until:
            time.sleep(0.01)

    monkeypatch.setattr(transfer, "_receive_into", slowly)
    monkeypatch.setattr("app.gang.mirror.node.SAY_AFTER", 0.01)
    said = bed.level()
    assert re.match(r"copying checkpoints: \d.* of 6.3 MB, \d of 2 files, \d.*/s", said[0])
    assert bed.read(1) == bed.read(0)


def test_a_name_leads_to_a_new_file_only_once_that_is_on_the_disk(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss of power leaves: the old file or the new one, and no memory of what is not there."""
    acts: list[str] = []

    def noted(name: str, act: Callable[..., None]) -> Callable[..., None]:
        def both(self: Disk, *arguments: object) -> None:
            acts.append(name)
            act(self, *arguments)

        return both

    for name in ("complete", "sync", "place", "write_state"):
        monkeypatch.setattr(Disk, name, noted(name, getattr(Disk, name)))
    for number in range(3):
        bed.write(0, f"step-1/{number}.pt", saved())
    bed.level()
    first, last = acts.index("complete"), len(acts) - acts[::-1].index("place")
    assert acts[first - 1 : first] == ["write_state"], "what is to come is known as a copy before it comes"
    assert acts[first:last] == ["complete"] * 3 + ["sync"] + ["place"] * 3
    assert acts[last:][:2] == ["sync", "write_state"]


def test_what_cannot_be_synced_gets_no_name(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_disk: Disk) -> None:
        raise OSError(5, "Input/output error")

    bed.write(0, "a.pt", saved())
    monkeypatch.setattr(Disk, "sync", fail)
    said = bed.level()
    assert bed.names(1) == set()
    assert any("node 1" in line and "input/output error" in line for line in said)
    monkeypatch.undo()
    bed.level()
    assert bed.read(1) == bed.read(0)


@pytest.mark.parametrize("token", [b"", b"secret"])
def test_content_that_changes_on_its_way_is_not_taken(bed: Bed, monkeypatch: pytest.MonkeyPatch, token: bytes) -> None:
    bed.token = token
    bed.write(0, "a.pt", saved("whole"))
    receive = transfer._receive_into

    def flipped(peer: socket.socket, room: memoryview) -> None:
        receive(peer, room)
        if bytes(room) == saved("whole"):
            room[40] ^= 1

    monkeypatch.setattr(transfer, "_receive_into", flipped)
    said = bed.level()
    assert bed.names(1) == set()
    assert any("a.pt" in line and "checksum" in line for line in said)
    monkeypatch.undo()
    bed.level()
    assert bed.read(1) == bed.read(0)


def test_nothing_of_a_stranger_is_answered_and_no_port_stays_open(bed: Bed) -> None:
    bed.write(0, "a.pt", saved())
    ports: list[int] = []

    def knock(rank: int, op: str) -> None:
        if op == "fetch":
            ports.append(int(bed.answers[0, "serve"]["port"]))
            with socket.create_connection(("127.0.0.1", ports[0]), 5) as stranger:
                stranger.recv(16)
                stranger.sendall(bytes(48))
                assert stranger.recv(1) == b""

    bed.hook = knock
    bed.level()
    assert bed.names(1) == {"a.pt"}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]), 5)


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../a", "a/../b", "a//b", "a/", ".", "a/./b", "a\0b", 5, "a" * 2000]
)
def test_a_path_of_a_peer_that_leads_elsewhere_is_refused(path: object) -> None:
    with pytest.raises(ValueError, match="path"):
        safe_path(path)


@pytest.mark.parametrize("target", ["../x", "/etc", "sub/../../x", "", 7])
def test_a_link_of_a_peer_that_leads_out_of_the_folder_is_refused(target: object) -> None:
    with pytest.raises(ValueError, match="link"):
        safe_link("latest", target)
    assert safe_link("a/latest", "../b/c") == "../b/c"


_WORDS = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.just([]), st.just({}))
_TOLD = st.recursive(_WORDS, lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=4))


@given(disk=_TOLD, entries=_TOLD, gone=_TOLD, orders=_TOLD)
def test_whatever_a_peer_tells_is_read_or_refused(disk: object, entries: object, gone: object, orders: object) -> None:
    told = {"disk": disk, "free": 1, "entries": entries, "previous": [], "gone": gone, "awaited": [], "left_out": 0}
    for read, value in (
        (read_manifest, told),
        (read_orders, orders),
        (read_orders, {"delete": entries, "fetch": gone}),
    ):
        with contextlib.suppress(ValueError):
            read(value)


_FILES = st.dictionaries(
    st.sampled_from(["a/x", "a/y", "b/x", "c.pt"]),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.booleans(), st.sampled_from(["", "d0", "d1", "d2", "lost"])),
)


@given(folders=st.lists(_FILES, min_size=2, max_size=3))
def test_nothing_of_a_nodes_own_is_ever_deleted_and_all_end_with_the_same_versions(
    folders: list[dict[str, tuple[int, int, bool, str]]],
) -> None:
    nodes = {}
    for rank, files in enumerate(folders):
        entries = {
            path: Entry(path=path, version=Version(size, at), torn=torn_, origin="" if disk == f"d{rank}" else disk)
            for path, (size, at, torn_, disk) in files.items()
        }
        nodes[rank] = Manifest(disk=f"d{rank}", free=10**9, entries=entries)
    plan = plan_transfers(nodes, {}, Bounds(keep=None))
    after = {}
    for rank, orders in plan.orders.items():
        have = {path: entry.version for path, entry in nodes[rank].entries.items()}
        for path, version in orders.delete:
            assert nodes[rank].entries[path].origin
            assert nodes[rank].entries[path].version == version
            del have[path]
        have.update({one.entry.path: one.entry.version for one in orders.fetch})
        after[rank] = have
        own = {path for path, entry in nodes[rank].entries.items() if not entry.origin}
        assert own <= have.keys()
    assert all(have == after[0] for have in after.values())
