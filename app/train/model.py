"""The model, a GPT small enough to read, and how it learns: optimizer, schedule, DDP or FSDP2. Put your own here."""

from collections.abc import Callable
from math import cos, pi, sqrt

import torch
import torch.nn.functional as F  # noqa: N812  # the name the whole field uses
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from app.train.settings import TrainSettings


class Block(nn.Module):
    """Causal self-attention, then a feed-forward layer, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.norm_feed = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(sequences, tokens, width) to the same shape."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(attended.transpose(1, 2).flatten(2))
        fed: Tensor = self.down(F.gelu(self.up(self.norm_feed(x)), approximate="tanh"))
        return x + fed


class GPT(nn.Module):
    """A decoder with learned positions; the output shares the weights of the input embedding."""

    def __init__(self, *, vocab: int, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("merge.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (sqrt(2 * layers) if into_residual else 1))

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward per token: 6 per parameter, and attention."""
        context, width = self.positions.weight.shape
        in_matrices = sum(weight.numel() for weight in self.parameters()) - self.positions.weight.numel()
        return 6 * in_matrices + 12 * len(self.blocks) * width * context

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (sequences, tokens, vocab) of the next token; with targets, the sum of their losses in nats."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


@torch.no_grad()
def sample(model: GPT, *, count: int, seed: int) -> str:
    """`count` bytes after "def ". Every rank draws the same ones, as sharded models need."""
    context, device = model.positions.num_embeddings, model.tokens.weight.device
    generator, text = torch.Generator(device).manual_seed(seed), torch.tensor(list(b"def "), device=device)
    for _ in range(count):
        probabilities = model(text[None, -context:])[0, -1].float().softmax(-1)
        text = torch.cat([text, torch.multinomial(probabilities, 1, generator=generator)])
    return bytes(text.tolist()).decode(errors="replace")


def uses_bf16(precision: str, device: torch.device) -> bool:
    """`auto` is bf16 where the GPU computes with it. Where torch emulates it (before Ampere), fp32 is faster."""
    on_good_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16" or (precision == "auto" and on_good_gpu)


def shard(model: GPT, device: torch.device, *, bf16: bool) -> None:
    """FSDP2, in place: each block, then the rest."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if bf16 else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def replicate(model: GPT, device: torch.device, on_last_gradient: Callable[[Tensor], None]) -> DistributedDataParallel:
    """DDP; the callback tells when only the gradients of the other ranks are missing."""
    # The first parameter gets its gradient last.
    model.tokens.weight.register_post_accumulate_grad_hook(on_last_gradient)  # type: ignore[no-untyped-call]  # no types there
    devices = None if device.type == "cpu" else [device]
    # The model has no buffers, so none are synchronised; the argument that says so has another name in each torch.
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


def adamw(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices only."""
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Linear warm-up, then a cosine down to `min_lr` of the peak: a function of the step, so nothing to restore."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * (1 + cos(pi * share)) / 2)
