"""A GPT as nanoGPT writes it (nn.Linear, exact GELU, tied head, AdamW that is not fused on a CPU), in a loop like its.

It is not nanoGPT's code, but its well-known shape: 4 layers, 4 heads, width 128, context 128, bytes.

`torchrun ... benchmarks/peers/nanogpt_like.py STEPS`
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  # the name the whole field uses
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from app.train.data import load_corpus, training_batch

SEQUENCES, CONTEXT, RATE = 16, 128, 1e-3
LAYERS, HEADS, WIDTH, VOCAB = 4, 4, 128, 256


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(sequences, tokens, width) to the same shape."""
        count, length, width = x.shape
        parts = self.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (part.view(count, length, HEADS, width // HEADS).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(attended.transpose(1, 2).contiguous().view(count, length, width))
        fed: Tensor = self.feed(self.ln_2(x))
        return x + fed


class GPT(nn.Module):
    """Learned positions, and a head that shares the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, VOCAB, bias=False)
        self.wte.weight = self.lm_head.weight
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss."""
        x = self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1]))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return F.cross_entropy(logits.view(-1, VOCAB), targets.reshape(-1))


def main(steps: int) -> None:
    """Trains `steps` steps of 16 sequences per rank."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    corpus = load_corpus("", CONTEXT)
    torch.manual_seed(0)
    net = GPT()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    count = SEQUENCES * world
    for step in range(steps):
        tokens = training_batch(corpus, position=step * count, count=count, rank=rank, world=world, seed=0)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 9 and rank == 0:
            print(f"step {step + 1} loss {float(loss):.4f}", flush=True)
    dist.barrier()


main(int(sys.argv[1]))
