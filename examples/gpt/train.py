"""A char-level GPT of the nanoGPT kind: one file, out/ckpt.pt of rank 0, resumed where it is there."""

import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

out_dir, max_iters, eval_interval = Path("out"), int(os.environ.get("STEPS", "40")), 10
batch_size, accumulation, block_size, width, layers, heads = 8, 2, 32, 32, 2, 2


class GPT(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(block_size, width)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        size = tokens.size(1)
        x = self.wte(tokens) + self.wpe(torch.arange(size, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(size, device=tokens.device)
        return nn.functional.cross_entropy(
            self.head(self.blocks(x, mask, is_causal=True)).flatten(0, 1), targets.flatten()
        )


ddp = "RANK" in os.environ  # as in nanoGPT: the script also runs without torchrun
rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
if ddp:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
torch.manual_seed(1337)
text = Path(os.__file__).read_text()
letters = {letter: index for index, letter in enumerate(sorted(set(text)))}
data = torch.tensor([letters[letter] for letter in text])
raw = GPT(len(letters)).to(device)
optimizer = torch.optim.AdamW(raw.parameters(), lr=1e-3)
iter_num = 0
if (out_dir / "ckpt.pt").exists():
    checkpoint = torch.load(out_dir / "ckpt.pt", map_location=device)
    raw.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    iter_num = checkpoint["iter_num"]
model = DistributedDataParallel(raw) if ddp else raw
print(f"rank {rank} begins at iter {iter_num}", flush=True)
while iter_num < max_iters:
    for micro in range(accumulation):
        seed = torch.Generator().manual_seed((iter_num * accumulation + micro) * 1000 + rank)
        starts = torch.randint(len(data) - block_size - 1, (batch_size,), generator=seed)
        x = torch.stack([data[i : i + block_size] for i in starts]).to(device)
        y = torch.stack([data[i + 1 : i + 1 + block_size] for i in starts]).to(device)
        with model.no_sync() if ddp and micro < accumulation - 1 else nullcontext():
            loss = model(x, y) / accumulation
            loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    iter_num += 1
    print(f"rank {rank} iter {iter_num} loss {loss.item() * accumulation:.4f}", flush=True)
    if rank == 0 and iter_num % eval_interval == 0:
        out_dir.mkdir(exist_ok=True)
        state = {"model": raw.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": iter_num}
        torch.save(state, out_dir / "ckpt.pt")
    time.sleep(float(os.environ.get("PAUSE", "0")))
if ddp:
    dist.destroy_process_group()
