"""One rank enters another collective than the others: a branch that depends on the rank. It knows nothing of us.

torchrun ... other_collective.py [RANK]        # default: rank 1 calls barrier where the others call all_reduce
"""

import sys

import torch
import torch.distributed as dist


def train(odd_rank: int) -> None:
    """Twenty steps of an all-reduce each; prints the ones that it has done."""
    for step in range(20):
        if step == 5 and dist.get_rank() == odd_rank:
            save_checkpoint()
        loss = torch.ones(1)
        dist.all_reduce(loss)
        print(f"rank {dist.get_rank()} has done step {step}", flush=True)


def save_checkpoint() -> None:
    """Waits for the others, who do not come."""
    dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    dist.destroy_process_group()
