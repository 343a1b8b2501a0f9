"""One rank sleeps where the others enter a collective: a slow step that never ends. It knows nothing of this project.

torchrun ... hang_before_collective.py [RANK] [SECONDS]        # default: rank 2 sleeps for an hour at step 5
"""

import sys
import time

import torch
import torch.distributed as dist


def train(slow_rank: int, seconds: float) -> None:
    """Twenty steps of an all-reduce each; prints the ones that it has done."""
    for step in range(20):
        if step == 5 and dist.get_rank() == slow_rank:
            load_batch(seconds)
        loss = torch.ones(1)
        dist.all_reduce(loss)
        print(f"rank {dist.get_rank()} has done step {step}", flush=True)


def load_batch(seconds: float) -> None:
    """A data source that answers late."""
    time.sleep(seconds)


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(int(sys.argv[1]) if len(sys.argv) > 1 else 2, float(sys.argv[2]) if len(sys.argv) > 2 else 3600.0)
    dist.destroy_process_group()
