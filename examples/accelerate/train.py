"""Accelerate: save_state every ten steps, load_state of the newest at the start."""

import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = int(os.environ.get("STEPS", "40"))
FOLDER = Path(os.environ.get("CHECKPOINT_DIR", "checkpoints"))


def newest() -> Path | None:
    """`done` is written last: a folder that has it is complete."""
    complete = sorted(mark.parent for mark in FOLDER.glob("step-*/done"))
    return complete[-1] if complete else None


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(x, x @ torch.arange(8.0).unsqueeze(1)), batch_size=32, shuffle=True)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    first = 0
    if folder := newest():
        accelerator.load_state(folder)
        first = int(folder.name.removeprefix("step-"))
    print(f"rank {accelerator.process_index} begins at step {first}", flush=True)
    batches = iter(loader)
    for step in range(first, STEPS):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        print(f"rank {accelerator.process_index} step {step} loss {loss.item():.6f}", flush=True)
        if (step + 1) % 10 == 0:
            folder = FOLDER / f"step-{step + 1:06d}"
            accelerator.save_state(folder)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (folder / "done").touch()
        time.sleep(float(os.environ.get("PAUSE", "0")))
    accelerator.end_training()


if __name__ == "__main__":
    main()
