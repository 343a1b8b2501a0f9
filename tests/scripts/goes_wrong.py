"""Steps of one all-reduce each, until something goes wrong on one rank. It knows nothing of this project.

torchrun ... goes_wrong.py WHAT [RANK]        # exception, memory, disk, import, loader, shards, slow; nothing
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

FOLDER = Path(os.environ.get("CHECKPOINT_DIR", "."))


def main(what: str, culprit: int) -> None:
    """Prints FAULT on the rank in question just before it goes wrong."""
    if what == "import":
        import preprocessing  # type: ignore[import-not-found]  # a file of the user's that one node lacks

        preprocessing.ready()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    fault = FAULTS.get(what)
    for step in range(100_000):
        if fault and step >= 5 and dist.get_rank() == culprit:
            if step == 5:
                print("FAULT", flush=True)
            fault(step)
        dist.all_reduce(torch.ones(1 << 18))
        if step % 100 == 5:
            print(f"step {step}", flush=True)
        time.sleep(0.05)


def bad_batch(_step: int) -> None:
    raise ValueError("bad batch")


def hoard(_step: int) -> None:
    """More memory than the container may have."""
    kept = []
    while True:
        kept.append(os.urandom(1 << 24))


def save(step: int) -> None:
    """A checkpoint of 4 MB at every step, none removed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(torch.ones(1 << 20), FOLDER / f"step-{step}.pt")


def load(_step: int) -> None:
    """Batches of 64 MB from a worker process, through /dev/shm."""
    big = TensorDataset(torch.ones(4, 1 << 24))
    for _ in DataLoader(big, batch_size=1, num_workers=1):
        pass


def crawl(_step: int) -> None:
    time.sleep(0.2)


def shards() -> None:
    """FSDP2: each rank saves its part into the folder, and a resume needs all of them."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    net = torch.nn.Linear(64, 64)
    fully_shard(net)
    net(torch.ones(1, 64)).sum().backward()
    save_parts(get_model_state_dict(net), checkpoint_id=FOLDER / "parts")
    print("saved", flush=True)
    dist.barrier()
    print("FAULT", flush=True)
    load_parts(get_model_state_dict(net), checkpoint_id=FOLDER / "parts")
    print("resumed", flush=True)


FAULTS = {"exception": bad_batch, "memory": hoard, "disk": save, "loader": load, "slow": crawl}

if __name__ == "__main__":
    if sys.argv[1] == "shards":
        shards()
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
