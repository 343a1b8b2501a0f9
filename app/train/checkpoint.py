"""Checkpoints over torch.distributed.checkpoint: atomic, asynchronous, and a full copy on every disk unless sharded.

`.metadata` is written last and renamed into place, so a folder that has it is complete and any other is torn.
"""

import os
import re
import shutil
import socket
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.utils._pytree import tree_leaves, tree_leaves_with_path

from app.train.ranks import agree, first_line, gathered
from app.train.settings import UserError

State = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, as this rank sees them. Every method is called by all ranks after the same step."""

    def __init__(self, folder: Path, *, keep: int, sharded: bool, say: Callable[[str], None]) -> None:
        """Finds out which ranks share a disk; the lowest rank of each disk writes to it.

        Raises:
            UserError: a rank cannot write, or a sharded run has no folder that all ranks share.
        """
        # Said of every save by one rank for its own disk, which is what we intend.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        self.folder, self.keep, self.sharded, self.say = folder, keep, sharded, say
        self.rank = dist.get_rank()
        self.node = f"node {os.environ.get('GROUP_RANK', '0')} ({socket.gethostname()})"
        owner = _lowest_rank_on_this_disk(folder, self.node)
        self.writes = owner == self.rank
        owners: list[int] = gathered(owner)
        if sharded and set(owners) != {0}:
            raise UserError(
                f"sharding=fsdp needs a CHECKPOINT_DIR that all ranks share, since each writes its part; ranks "
                f"{[r for r, o in enumerate(owners) if o]} do not see what rank 0 wrote to {folder}. "
                "Mount shared storage there, or use sharding=ddp."
            )
        # A save in the background must not share a group with the collectives of the steps.
        self.group = dist.new_group(backend="gloo") if sharded else None
        self.pending: tuple[int, Future[Any]] | None = None
        self.last_error = ""

    def restore(self, state: State) -> int | None:
        """Loads the newest complete checkpoint of any disk into `state` in place, on all ranks; its step, or None.

        Raises:
            UserError: it is of another model, or there are checkpoints and none can be read. Nothing is changed.
        """
        found: list[list[int]] = gathered(complete_steps(self.folder) if self.writes else [])
        candidates = sorted(((step, rank) for rank, steps in enumerate(found) for step in steps), key=_newest_first)
        unreadable: list[Path] = []
        for step, source in candidates:
            problem = self._load(step, source, state)
            if problem is None:
                if not self.sharded:
                    _broadcast(state, source)
                for bad in unreadable:
                    _set_aside(bad)
                return step
            if source == self.rank:
                unreadable.append(self._path(step))
                self.say(f"{self.node}: {problem}. Trying the one before.")
        if candidates:
            raise UserError(
                f"no checkpoint in {self.folder} can be read, of steps {sorted({s for s, _ in candidates})}. "
                "Nothing was changed. Repair or move them away, or choose another RUN_NAME to begin anew."
            )
        return None

    def save(self, state: State, step: int) -> None:
        """Begins to save in the background, after the save before has ended; no-op where this step is there already."""
        self.wait()
        if not (self.writes or self.sharded) or (self._path(step) / ".metadata").exists():
            return
        if problem := "" if self.sharded else _lack_of_space(self.folder, state):
            self._failed(step, problem)
            return
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        future = async_save(
            state, checkpoint_id=self._path(step), planner=planner, process_group=self.group, no_dist=not self.sharded
        )
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
            self._failed(step, _reason(error))
            return
        self.last_error = ""
        if self.writes:
            self._prune()

    def newest(self) -> str:
        """The newest complete checkpoint of this disk, for messages."""
        steps = complete_steps(self.folder)
        return f"step {steps[-1]} in {self.folder}" if steps else f"none in {self.folder}"

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _load(self, step: int, source: int, state: State) -> str | None:
        problem: str | UserError | None = None
        if self.sharded or source == self.rank:
            problem = _load(self._path(step), state, no_dist=not self.sharded)
        box = [problem]
        dist.broadcast_object_list(box, src=source)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def _failed(self, step: int, problem: str) -> None:
        self.last_error = problem
        if self.writes:
            shutil.rmtree(self._path(step), ignore_errors=True)
            self.say(
                f"{self.node}: the checkpoint of step {step} could not be saved: {problem}. "
                f"Training goes on; the last good one here: {self.newest()}."
            )

    def _prune(self) -> None:
        kept = {self._path(step) for step in complete_steps(self.folder)[-self.keep :]}
        for path in _folders(self.folder):
            if path not in kept:
                # Without its mark it is torn, should this be killed half way.
                (path / ".metadata").unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    return sorted(int(path.name[5:]) for path in _folders(folder) if (path / ".metadata").exists())


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)]


def _newest_first(candidate: tuple[int, int]) -> tuple[int, int]:
    return -candidate[0], candidate[1]


def _lowest_rank_on_this_disk(folder: Path, node: str) -> int:
    """The lowest rank whose probe file this rank sees in its own `folder`, itself included."""
    box = [uuid.uuid4().hex]
    dist.broadcast_object_list(box, src=0)
    mine = folder / f".probe-{box[0]}-{dist.get_rank()}"
    problem = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.touch()
    except OSError as error:
        problem = f"{node}: CHECKPOINT_DIR={folder} cannot be written: {error.strerror} (user id {os.getuid()})."
    agree(problem)
    # Asked by name, not listed: a network file system may show an old listing for a minute.
    owner = next(r for r in range(dist.get_world_size()) if (folder / f".probe-{box[0]}-{r}").exists())
    dist.barrier()
    mine.unlink(missing_ok=True)
    return owner


def _load(path: Path, state: State, *, no_dist: bool) -> str | UserError | None:
    try:
        if difference := _difference(path, state):
            return UserError(
                f"{path} is a checkpoint of another model: {difference}. Nothing was changed. "
                "Go back to the settings it was made with, or choose another RUN_NAME to begin anew."
            )
        load(state, checkpoint_id=path, no_dist=no_dist)
    except (Exception, CheckpointException) as error:  # whatever is wrong, the one before may be fine
        return f"{path} cannot be read: {_reason(error)}"
    return None


def _difference(path: Path, state: State) -> str:
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    wanted = {_dotted(keys): leaf.shape for keys, leaf in tree_leaves_with_path(state) if isinstance(leaf, Tensor)}
    for name, shape in wanted.items():
        there = saved.get(name)
        if not isinstance(there, TensorStorageMetadata):
            return f"it has no {name}"
        if there.size != shape:
            return f"its {name} is {tuple(there.size)}, this model's is {tuple(shape)}"
    extra = [name for name in saved if name.startswith("model.") and name not in wanted]
    return f"this model has no {extra[0]}" if extra else ""


def _dotted(keys: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)


def _broadcast(state: State, source: int) -> None:
    for leaf in tree_leaves(state):
        if isinstance(leaf, Tensor):
            dist.broadcast(leaf, src=source)
    box = [state["progress"]]
    dist.broadcast_object_list(box, src=source)
    state["progress"] = box[0]


def _set_aside(path: Path) -> None:
    target = path.with_name(f"{path.name}.unreadable-{uuid.uuid4().hex[:6]}")
    try:
        path.rename(target)
    except OSError:
        # Left where it is, a later save of the same step says why it fails.
        return


def _lack_of_space(folder: Path, state: State) -> str:
    needed = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return ""
    return f"the disk of {folder} has {free / 1e6:.1f} MB free, it needs {needed / 1e6:.1f} MB"


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {first_line(error)}"
