"""How a step is spread over ranks and devices: DDP or FSDP2, the optimizer and its schedule."""

from contextlib import AbstractContextManager, nullcontext
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from app.train.metrics import Clock
from app.train.model import GPT
from app.train.ranks import Place
from app.train.settings import Settings


def in_parallel(net: GPT, settings: Settings, place: Place, clock: Clock, *, bf16: bool) -> nn.Module:
    """The model to call: a copy on every rank, or a shard. `net` stays the model to evaluate and to save."""
    if settings.sharding == "fsdp":
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = half if bf16 else MixedPrecisionPolicy()
        mesh = init_device_mesh(place.device.type, (place.world,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(net, mesh=mesh, mp_policy=policy)
        return net
    # The first parameter gets its gradient last.
    next(net.parameters()).register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]  # torch has no types there
        lambda _: clock.gradients_are_there()
    )
    return DistributedDataParallel(
        net,
        device_ids=[place.local_rank] if place.device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def synchronized(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients are exchanged with the last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def adamw(net: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices only."""
    matrices = [weight for weight in net.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in net.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def to_device(tokens: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine down to `min_lr` of the peak: a function of the step, so nothing to restore."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * (1 + cos(pi * share)) / 2)
