"""Our model in a loop by Lightning Fabric, as its documentation writes one: `torchrun ... fabric_loop.py STEPS`."""

import os
import sys

import torch
from lightning_fabric import Fabric  # type: ignore[import-not-found]  # in the venv of the peers only
from torch.utils.data import DataLoader, TensorDataset

from app.train.data import load_corpus, training_batch
from app.train.model import GPT

SEQUENCES, CONTEXT, RATE = 16, 128, 1e-3


def main(steps: int) -> None:
    """Trains `steps` steps of 16 sequences per rank."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(accelerator=accelerator, strategy="ddp", devices=local, num_nodes=world // local)
    fabric.launch()
    count = steps * SEQUENCES * world
    tokens = training_batch(load_corpus("", CONTEXT), position=0, count=count, rank=0, world=1, seed=0)
    torch.manual_seed(0)
    net = GPT(vocab=256, context=CONTEXT, layers=4, heads=4, width=128)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model, optimizer = fabric.setup(net, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(tokens), batch_size=SEQUENCES, shuffle=True))
    for step, (batch,) in enumerate(loader, start=1):
        loss = model(batch[:, :-1], batch[:, 1:]) / (SEQUENCES * CONTEXT)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            fabric.print(f"step {step} loss {loss.item():.4f}", flush=True)


main(int(sys.argv[1]))
