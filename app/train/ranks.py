"""This process among the ranks: which device it has, what all ranks know, and when all of them stop."""

import os
import signal
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from app.train.settings import Settings, UserError

_T = TypeVar("_T")
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket closed")
"""How gloo words it, in gloo/transport/tcp/{pair,unbound_buffer}.cc."""
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this process stands among the ranks."""

    rank: int
    world: int
    local_rank: int
    node: str
    device: torch.device
    device_name: str

    def __str__(self) -> str:
        name = str(self.device) if self.device_name == "cpu" else f"{self.device} {self.device_name}"
        return f"rank {self.rank} of {self.world}, local rank {self.local_rank}, {self.node}, device {name}"


def connect(settings: Settings) -> Place:
    """Joins the process group: NCCL for GPUs and gloo for CPUs, both where there are GPUs. Without torchrun, one rank.

    Raises:
        UserError: there is no GPU for this rank.
    """
    env = os.environ
    rank, world, local_rank = (int(env.get(name, default)) for name, default in _ALONE.items())
    gpus = torch.cuda.device_count()
    device = torch.device("cpu")
    if settings.device == "cuda" or (settings.device == "auto" and gpus):
        if local_rank >= gpus:
            raise UserError(
                f"local rank {local_rank} needs a GPU of its own and there are {gpus}: lower NPROC_PER_NODE."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Gloo carries the agreement to stop and the checkpoints' messages; neither may wait for the GPU.
    on_gpu = device.type == "cuda"
    nccl = on_gpu and env.get("BACKEND") != "gloo"
    alone: dict[str, Any] = {} if "MASTER_ADDR" in env else {"store": HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        timeout=timedelta(seconds=settings.timeout),
        device_id=device if nccl else None,
        **alone,
    )
    return Place(
        rank=rank,
        world=world,
        local_rank=local_rank,
        node=f"node {env.get('GROUP_RANK', '0')} ({socket.gethostname()})",
        device=device,
        device_name=torch.cuda.get_device_name(device) if on_gpu else "cpu",
    )


def gathered(value: _T) -> list[_T]:
    """`value` of every rank, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(problem: str) -> None:
    """Raises the problems of all ranks on all ranks, so that none is left waiting for the others."""
    problems = [text for text in dict.fromkeys(gathered(problem)) if text]
    if problems:
        raise UserError("\n".join(problems))


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error of a collective means that another rank is gone, not that this one is wrong."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST)


def first_line(error: BaseException) -> str:
    """What an error says, without the stack that some carry in their text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def leave(code: int) -> NoReturn:
    """Ends the process without tearing down Python and torch.

    Seen with torch 2.13 and gloo: of 26 runs that were stopped, 3 hung for ever while DDP was being freed. The cause
    was not found; since ranks leave this way, 25 of 25 ended.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class StopRequest:
    """SIGTERM or SIGINT on any rank ends all ranks after the same step. The handler only stores the number."""

    def __init__(self) -> None:
        self.received = 0
        self.asked: tuple[Tensor, dist.Work] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._store)

    def agreed(self) -> int:
        """The signal that all ranks know of, or 0. The question is asked now and read one step later: nobody waits."""
        answer = 0
        if self.asked:
            flag, work = self.asked
            work.wait()
            answer = int(flag)
        if not answer:
            flag = torch.tensor(self.received)
            self.asked = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        return answer

    def _store(self, number: int, _frame: object) -> None:
        self.received = number

    def close(self) -> None:
        """Ends the last question, which all ranks have asked."""
        if self.asked:
            self.asked[1].wait()
