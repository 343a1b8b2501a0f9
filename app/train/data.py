"""A corpus, and batches of it as a pure function of seed and position: a resume needs nothing but a number."""

import hashlib
import sysconfig
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from app.train.settings import TrainError

MAPPED_FROM = 1 << 20
"""Bytes from which a file is mapped, not read; a process may hold only some 65,000 mappings (vm.max_map_count)."""
HELD_OUT = 20
"""The last of every so many windows is held out for evaluation."""


class Corpus:
    """Files laid end to end as one row of tokens, cut into windows of `context` tokens and the one that follows.

    `training` windows are trained on, `held_out` ones never; `digest` is SHA-256 over the size, the first and the last
    MiB of every file.
    """

    def __init__(self, files: Sequence[Tensor], context: int, digest: str) -> None:
        """Cuts files that are open."""
        self.files, self.context, self.digest = files, context, digest
        *self.starts, self.length = accumulate(map(len, files), initial=0)
        windows = (self.length - 1) // context
        self.held_out = windows // HELD_OUT
        self.training = windows - self.held_out

    def window(self, index: int) -> Tensor:
        """Tokens of one window, int64 (context + 1,)."""
        start, end = index * self.context, (index + 1) * self.context + 1
        pieces = []
        while start < end:
            file = bisect_right(self.starts, start) - 1
            offset = start - self.starts[file]
            pieces.append(self.files[file][offset : offset + end - start].long())
            start += len(pieces[-1])
        return torch.cat(pieces)

    def windows(self, indices: Sequence[int]) -> Tensor:
        """Several windows, or none: (windows, context + 1)."""
        rows = [self.window(index) for index in indices]
        return torch.stack(rows) if rows else torch.empty(0, self.context + 1, dtype=torch.int64)


def load_corpus(data: str, context: int) -> Corpus:
    """The user's files, or the top-level modules of Python's standard library: real text that every image has.

    Raises:
        TrainError: nothing usable is there.
    """
    try:
        paths = _paths(Path(data)) if data else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        paths = [path for path in paths if path.stat().st_size >= (2 if path.suffix == ".bin" else 1)]
        if len({path.suffix == ".bin" for path in paths}) != 1:
            mixed = "both token files (.bin) and text: keep one kind" if paths else "no file with content"
            raise TrainError(f"DATA={data}: {mixed} there.")
        digest = _digest(paths)
        corpus = Corpus([_open(path) for path in paths], context, digest)
    except OSError as error:
        raise TrainError(f"DATA={data}: cannot read {error.filename}: {error.strerror}.") from error
    if not corpus.held_out:
        least = f"at least {HELD_OUT} times context={context}"
        raise TrainError(f"DATA={data}: {corpus.length} tokens are too few: {least}.")
    return corpus


def training_batch(corpus: Corpus, *, position: int, count: int, rank: int, world: int, seed: int) -> Tensor:
    """This rank's share of the `count` windows from `position` on in the endless shuffled order: (share, context + 1).

    Position p is window `shuffled(p mod windows)` of epoch `p div windows`; every world size reads the same windows.
    """
    places = torch.arange(position + rank, position + count, world)
    epoch, index = places // corpus.training, places % corpus.training
    place = shuffled(index, epoch=epoch, size=corpus.training, seed=seed)
    return corpus.windows((place + place // (HELD_OUT - 1)).tolist())


def held_out_batch(corpus: Corpus, *, count: int, rank: int, world: int) -> Tensor:
    """This rank's share of `count` held-out windows from all over the corpus, or of all: (share, context + 1)."""
    stride = max(1, corpus.held_out // count)
    chosen = range(0, corpus.held_out, stride)[:count][rank::world]
    return corpus.windows([HELD_OUT * place + HELD_OUT - 1 for place in chosen])


def shuffled(index: Tensor, *, epoch: Tensor, size: int, seed: int) -> Tensor:
    """A permutation of 0..size-1 per epoch, computed place by place: int64 of any shape to the same shape.

    A Feistel network over the next even number of bits, walked until it lands inside `size`; unlike `randperm` it
    needs no memory, which matters for corpora of billions of windows.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    key = epoch * 0x2545F4914F6CDD1D + (seed * 0x1C69B3F74AC4AE35 & 0x7FFFFFFFFFFFFFFF)

    def once(place: Tensor) -> Tensor:
        left, right = place >> half, place & low
        for turn in range(4):
            mixed = (right + key + turn * 0x1D8E4E27C47D124F) * 0x3C79AC492BA7B653
            mixed = (mixed ^ mixed >> 33) * 0x1C69B3F74AC4AE35
            left, right = right, left ^ (mixed >> 27 & low)
        return left << half | right

    place = once(index)
    while bool((outside := place >= size).any()):
        place = torch.where(outside, once(place), place)
    return place


def _paths(data: Path) -> list[Path]:
    if not data.exists():
        raise TrainError(f"DATA={data}: there is no such file or folder in this container or machine.")
    if data.is_file():
        return [data]
    files = (path for path in data.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(data).parts))


def _open(path: Path) -> Tensor:
    dtype = torch.uint16 if path.suffix == ".bin" else torch.uint8
    count = path.stat().st_size // dtype.itemsize
    if path.stat().st_size < MAPPED_FROM:
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype, count=count)
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype)


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(1 << 20, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()
