"""FSDP2 with torch.distributed.checkpoint: every rank writes its shards, and reads those of all at the start."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS = int(os.environ.get("STEPS", "40"))
FOLDER = Path(os.environ.get("CHECKPOINT_DIR", "checkpoints"))


def newest() -> Path | None:
    """DCP writes .metadata last: a folder that has it is complete."""
    complete = sorted(mark.parent for mark in FOLDER.glob("step-*/.metadata"))
    return complete[-1] if complete else None


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)), nn.Linear(16, 1)).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    first = 0
    if folder := newest():
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "step": 0}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first = state["step"]
    print(f"rank {dist.get_rank()} begins at step {first}", flush=True)
    for step in range(first, STEPS):
        batch = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        x = torch.randn(32, 16, generator=batch).to(device)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {dist.get_rank()} step {step} loss {loss.item():.6f}", flush=True)
        if (step + 1) % 10 == 0:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments, "step": step + 1}
            dcp.save(state, checkpoint_id=FOLDER / f"step-{step + 1:06d}")
        time.sleep(float(os.environ.get("PAUSE", "0")))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
