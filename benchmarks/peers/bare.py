"""Our model in the shortest DDP loop: no stop agreement, no metrics, no checkpoint: what it costs to be operable.

`torchrun ... benchmarks/peers/bare.py STEPS`
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from app.train.data import load_corpus, training_batch
from app.train.model import GPT

SEQUENCES, CONTEXT, RATE = 16, 128, 1e-3


def main(steps: int) -> None:
    """Trains `steps` steps of 16 sequences per rank."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    corpus = load_corpus("", CONTEXT)
    torch.manual_seed(0)
    net = GPT(vocab=256, context=CONTEXT, layers=4, heads=4, width=128)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    count = SEQUENCES * world
    for step in range(steps):
        tokens = training_batch(corpus, position=step * count, count=count, rank=rank, world=world, seed=0)
        loss = model(tokens[:, :-1], tokens[:, 1:]) / (SEQUENCES * CONTEXT)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 and rank == 0:
            print(f"step {step + 1} loss {float(loss):.4f}", flush=True)
    dist.barrier()


main(int(sys.argv[1]))
