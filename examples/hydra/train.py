"""Hydra: its outputs/ appear in the current folder; settings come as `NAME=VALUE` arguments."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FOLDER = Path(os.environ.get("CHECKPOINT_DIR", "checkpoints"))


@dataclass
class Config:
    steps: int = int(os.environ.get("STEPS", "40"))
    lr: float = 0.02


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base=None, config_name="config")
def main(config: Config) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 1).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    first, last = 0, FOLDER / "last.pt"
    if last.exists():
        state = torch.load(last, map_location=device)
        model.module.load_state_dict(state["model"])
        first = state["step"]
    print(f"rank {dist.get_rank()} begins at step {first}", flush=True)
    for step in range(first, config.steps):
        batch = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        x = torch.randn(32, 8, generator=batch).to(device)
        loss = nn.functional.mse_loss(model(x), x @ torch.arange(8.0, device=device).unsqueeze(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {dist.get_rank()} step {step} loss {loss.item():.6f}", flush=True)
        if dist.get_rank() == 0 and (step + 1) % 10 == 0:
            FOLDER.mkdir(parents=True, exist_ok=True)
            torch.save({"model": model.module.state_dict(), "step": step + 1}, last)
        time.sleep(float(os.environ.get("PAUSE", "0")))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
