"""The order of the data: a pure function of seed and position that no world size changes."""

import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.train.data import Corpus, held_out_batch, load_corpus, shuffled, training_batch
from app.train.settings import TrainError

CONTEXT = 8


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Numbered tokens in three files, so that windows can be told apart and some cross from file to file."""
    for name, part in (("a.bin", range(500)), ("b.bin", range(500, 503)), ("c.bin", range(503, 2000))):
        (tmp_path / name).write_bytes(struct.pack(f"<{len(part)}H", *part))
    return load_corpus(str(tmp_path), CONTEXT)


def _windows(batch: torch.Tensor) -> list[int]:
    return [int(row[0]) // CONTEXT for row in batch]


@given(size=st.integers(1, 2000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = shuffled(torch.arange(size), epoch=torch.tensor(epoch), size=size, seed=seed)
    assert sorted(order.tolist()) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(epoch: int, seed: int) -> tuple[int, ...]:
        return tuple(shuffled(torch.arange(1000), epoch=torch.tensor(epoch), size=1000, seed=seed).tolist())

    orders = {order(epoch, seed) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25
    assert all(sum(a == b for a, b in enumerate(one)) < 20 for one in orders), "places that stay are rare"


def test_an_epoch_reads_every_training_window_once_and_no_held_out_window(corpus: Corpus) -> None:
    batch = training_batch(corpus, position=0, count=corpus.training, rank=0, world=1, seed=3)
    held_out = held_out_batch(corpus, count=corpus.held_out, rank=0, world=1)
    assert len(held_out) == (corpus.training + corpus.held_out) // 20
    assert sorted(_windows(batch) + _windows(held_out)) == list(range(corpus.training + corpus.held_out))


def test_windows_hold_consecutive_tokens_across_files(corpus: Corpus) -> None:
    for index in range(corpus.training + corpus.held_out):
        assert corpus.window(index).tolist() == list(range(index * CONTEXT, (index + 1) * CONTEXT + 1))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_the_global_batch_does_not_depend_on_the_world_size(corpus: Corpus, world: int) -> None:
    position = corpus.training - 4  # crosses into the next epoch
    shares = [
        training_batch(corpus, position=position, count=10, rank=rank, world=world, seed=1) for rank in range(world)
    ]
    whole = training_batch(corpus, position=position, count=10, rank=0, world=1, seed=1)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(_windows(torch.cat(shares))) == sorted(_windows(whole))


def test_positions_continue_where_the_last_batch_ended(corpus: Corpus) -> None:
    one = training_batch(corpus, position=30, count=12, rank=0, world=1, seed=0)
    two = [training_batch(corpus, position=p, count=6, rank=0, world=1, seed=0) for p in (30, 36)]
    assert torch.equal(one, torch.cat(two))


def test_token_files_are_unsigned_and_text_is_bytes(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(struct.pack("<400H", *range(65136, 65536)))
    assert load_corpus(str(tmp_path / "t.bin"), CONTEXT).window(0).tolist() == list(range(65136, 65145))
    (tmp_path / "t.txt").write_text("höflich " * 100)
    assert bytes(load_corpus(str(tmp_path / "t.txt"), CONTEXT).window(0).tolist()) == "höflich ".encode()


def test_a_large_file_is_mapped_and_reads_the_same(tmp_path: Path) -> None:
    content = bytes(range(256)) * 8192
    (tmp_path / "large.txt").write_bytes(content)
    corpus = load_corpus(str(tmp_path), 100)
    assert bytes(corpus.window(1234).tolist()) == content[123400:123501]


def test_hidden_files_and_what_is_in_hidden_folders_are_no_data(tmp_path: Path) -> None:
    for name in (".DS_Store", ".git/config", "a/.cache/b.txt", "a/seen.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name[:1] * 500)
    assert [bytes(file.tolist()) for file in load_corpus(str(tmp_path), CONTEXT).files] == [b"a" * 500]


@pytest.mark.parametrize("size", [1000, 2 << 20])
def test_a_file_that_may_not_be_read_is_refused_by_its_name(size: int) -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        file = Path(folder, "text.txt")
        file.write_bytes(bytes(size))
        file.chmod(0)
        os.seteuid(user or 65534)  # root may read everything
        try:
            with pytest.raises(TrainError, match=r"cannot read \S+/text.txt: Permission denied"):
                load_corpus(folder, CONTEXT)
        finally:
            os.seteuid(user)


def test_the_digest_tells_contents_apart(tmp_path: Path) -> None:
    digests = set()
    for text in ("a" * 500, "a" * 499 + "b", "a" * 501):
        (tmp_path / "t.txt").write_text(text)
        digests.add(load_corpus(str(tmp_path), CONTEXT).digest)
    assert len(digests) == 3


def _nothing(folder: Path) -> Path:
    return folder / "missing"


def _empty(folder: Path) -> Path:
    (folder / "empty.txt").touch()
    return folder


def _too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


def _mixed(folder: Path) -> Path:
    (folder / "a.txt").write_text("text")
    (folder / "b.bin").write_bytes(b"1234")
    return folder


def _short(folder: Path) -> Path:
    (folder / "a.txt").write_text("short")
    return folder


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_too_long, "File name too long"),
        (_nothing, "there is no such file or folder"),
        (_empty, "no file with content there"),
        (_mixed, "both token files (.bin) and text: keep one kind"),
        (_short, "5 tokens are too few"),
    ],
)
def test_data_that_cannot_be_used_is_refused_by_a_sentence(
    tmp_path: Path, prepare: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(TrainError) as error:
        load_corpus(str(prepare(tmp_path)), CONTEXT)
    assert message in str(error.value)
    assert "DATA=" in str(error.value)
