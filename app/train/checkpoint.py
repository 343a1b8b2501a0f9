"""Checkpoints over torch.distributed.checkpoint: atomic, asynchronous, and a full copy on every disk unless sharded.

`.metadata` is written last and renamed into place, so a folder that has it is complete and any other is torn.
"""

import os
import shutil
import socket
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from app.train.settings import TrainError, say

State = dict[str, Any]
"""Tensors by name, which are those of the run, so that loading into them is all that a resume takes; and progress."""
STEP = "step-" + 8 * "[0-9]"
"""The folders of checkpoints, and neither `step-N.unreadable-*` nor what else may be there."""
_T = TypeVar("_T")


def gathered(value: _T) -> list[_T]:
    """`value` of every rank, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(problem: str) -> None:
    """Raises the problems of all ranks on all ranks, so that none is left waiting for the others."""
    problems = [text for text in dict.fromkeys(gathered(problem and f"{node()}: {problem}")) if text]
    if problems:
        raise TrainError("\n".join(problems))


def node() -> str:
    """The name of this node in messages."""
    return f"node {os.environ.get('GROUP_RANK', '0')} ({socket.gethostname()})"


def disk_owner(folder: Path, variable: str) -> int:
    """Makes a folder on all ranks; the lowest rank that sees this rank's one as its own, itself included.

    Raises:
        TrainError: a rank cannot write there.
    """
    names = gathered(f".probe-{uuid4().hex}")
    mine, problem = folder / names[dist.get_rank()], ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.touch()
    except OSError as error:
        problem = f"{variable}={folder} cannot be written: {error.strerror} (user id {os.getuid()})."
    agree(problem)
    # Asked by name, not listed: a network file system may show an old listing for a minute.
    owner = next(rank for rank, name in enumerate(names) if (folder / name).exists())
    dist.barrier()
    mine.unlink()
    return owner


class CheckpointFolder:
    """The checkpoints of one run, as this rank sees them. Every method is called by all ranks after the same step."""

    def __init__(self, folder: Path, *, keep: int, sharded: bool) -> None:
        """Finds out which ranks share a disk; the lowest rank of each disk writes to it.

        Raises:
            TrainError: a rank cannot write, or a sharded run has no folder that all ranks share.
        """
        # Said of every save by one rank for its own disk, which is what we intend.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        self.folder, self.keep, self.sharded, self.rank = folder, keep, sharded, dist.get_rank()
        owner = disk_owner(folder, "CHECKPOINT_DIR")
        if sharded and (strangers := [rank for rank, other in enumerate(gathered(owner)) if other]):
            raise TrainError(
                "sharding=fsdp needs a CHECKPOINT_DIR that all ranks share, since each writes its part; "
                f"ranks {strangers} do not see what rank 0 wrote to {folder}. "
                "Mount shared storage there, or use sharding=ddp."
            )
        self.cares_for_disk, self.writes = owner == self.rank, sharded or owner == self.rank
        # A save in the background must not share a group with the collectives of the steps.
        self.group = dist.new_group(backend="gloo") if sharded else None
        self.pending: tuple[int, Future[Any]] | None = None

    def restore(self, fresh_state: Callable[[], State]) -> State | None:
        """Loads the newest complete checkpoint of any disk into the run's own state, on all ranks; None without any.

        Raises:
            TrainError: there are checkpoints and none is readable and of this model. Nothing is changed.
        """
        found = gathered(self.complete() if self.cares_for_disk else [])
        candidates = sorted((-step, rank) for rank, steps in enumerate(found) for step in steps)
        if not candidates:
            return None
        state, unusable = fresh_state(), list[Path]()
        for minus_step, source in candidates:
            path = self._path(-minus_step)
            if self._load(path, source, state):
                for bad in unusable:
                    with suppress(OSError):  # left where it is, a later save of the same step says why it fails
                        bad.rename(f"{bad}.unreadable-{uuid4().hex[:6]}")
                return state
            if self.rank == source:
                unusable.append(path)
        raise TrainError(
            f"no checkpoint in {self.folder} can be used, of steps {sorted({-step for step, _ in candidates})}. "
            "Nothing was changed. Repair or move them away, go back to the settings they were made with, or choose "
            "another RUN_NAME to begin anew."
        )

    def save(self, state: State, step: int) -> None:
        """Begins to save in the background, after the save before has ended; no-op where this step is there already."""
        self.wait()
        path = self._path(step)
        if self.writes and not (path / ".metadata").exists():
            future = async_save(state, checkpoint_id=path, process_group=self.group, no_dist=not self.sharded)
            self.pending = step, future  # type: ignore[assignment]  # the other type is for stagers that we do not use

    def poll(self) -> None:
        """Closes the save in the background if it has ended. Costs nothing otherwise."""
        if self.pending and self.pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background, says so if it failed, and removes what is no longer kept."""
        if self.pending is None:
            return
        (step, future), self.pending = self.pending, None
        try:
            future.result()
        except (Exception, CheckpointException) as error:  # training outlives any failure to save
            if self.cares_for_disk:
                shutil.rmtree(self._path(step), ignore_errors=True)
                say(
                    f"{node()}: the checkpoint of step {step} could not be saved: {_reason(error)}. "
                    f"Training goes on; the last good one here: {self.newest()}."
                )
            return
        if self.cares_for_disk:
            kept = {self._path(step) for step in self.complete()[-self.keep :]}
            for path in set(self.folder.glob(STEP)) - kept:
                with suppress(OSError):  # without its mark it is torn, should this be killed half way
                    (path / ".metadata").unlink()
                shutil.rmtree(path, ignore_errors=True)

    def complete(self) -> list[int]:
        """Steps of the complete checkpoints on this disk, oldest first."""
        return sorted(int(mark.parent.name[5:]) for mark in self.folder.glob(f"{STEP}/.metadata"))

    def newest(self) -> str:
        """The newest complete checkpoint of this disk, for messages."""
        steps = self.complete()
        return f"step {steps[-1]} in {self.folder}" if steps else f"none in {self.folder}"

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _load(self, path: Path, source: int, state: State) -> bool:
        """Loads what `source` has into the state of all ranks, unless something is wrong with it."""
        problem = ""
        if self.sharded or self.rank == source:
            try:
                problem = _difference(path, state)
                if not problem:
                    load(state, checkpoint_id=path, no_dist=not self.sharded)
            except (Exception, CheckpointException) as error:  # whatever is wrong, the one before may be fine
                problem = f"cannot be read: {_reason(error)}"
        if problem and self.rank == source:
            say(f"{node()}: {path} {problem}. Trying the one before.")
        if any(gathered(problem)):
            return False
        if not self.sharded:
            for value in state.values():
                if isinstance(value, Tensor):
                    dist.broadcast(value, src=source)
            state["progress"] = gathered(state["progress"])[source]
        return True


def _difference(path: Path, state: State) -> str:
    """How the tensors of a checkpoint differ from those of the run, or nothing."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    there = {name: tuple(entry.size) for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
    here = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            sizes = f"{there.get(name, 'missing')}, this model's is {here.get(name, 'missing')}"
            return f"is a checkpoint of another model: its {name} is {sizes}"
    return ""


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return next(iter(f"{type(error).__name__}: {error}".splitlines()))
