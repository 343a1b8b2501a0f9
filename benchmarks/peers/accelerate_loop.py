"""Our model in a loop by Hugging Face Accelerate, as its documentation writes one.

`torchrun ... benchmarks/peers/accelerate_loop.py STEPS`
"""

import sys

import torch
from accelerate import Accelerator  # type: ignore[import-not-found]  # in the venv of the peers only
from torch.utils.data import DataLoader, TensorDataset

from app.train.data import load_corpus, training_batch
from app.train.model import GPT

SEQUENCES, CONTEXT, RATE = 16, 128, 1e-3


def main(steps: int) -> None:
    """Trains `steps` steps of 16 sequences per rank."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    count = steps * SEQUENCES * accelerator.num_processes
    tokens = training_batch(load_corpus("", CONTEXT), position=0, count=count, rank=0, world=1, seed=0)
    torch.manual_seed(0)
    model = GPT(vocab=256, context=CONTEXT, layers=4, heads=4, width=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loader = DataLoader(TensorDataset(tokens), batch_size=SEQUENCES, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, (batch,) in enumerate(loader, start=1):
        loss = model(batch[:, :-1], batch[:, 1:]) / (SEQUENCES * CONTEXT)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            accelerator.print(f"step {step} loss {loss.item():.4f}", flush=True)
    accelerator.end_training()


main(int(sys.argv[1]))
