"""A script in the style of the DDP tutorials: env:// rendezvous, set_device(LOCAL_RANK), a snapshot it resumes from.

It knows nothing of this project: it must run as it is. Its only change from a GPU-only script is that CUDA is optional.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main() -> None:
    """Fits a plane; the last line it prints is the loss."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", init_method="env://")

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, generator=generator)
    y = x @ torch.arange(8.0).unsqueeze(1)
    data = TensorDataset(x, y)
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)

    model = DistributedDataParallel(nn.Linear(8, 1).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snapshot = Path(os.environ.get("CHECKPOINT_DIR", "."), "snapshot.pt")
    first_epoch = 0
    if snapshot.exists():
        saved = torch.load(snapshot, map_location=device)
        model.module.load_state_dict(saved["model"])
        first_epoch = saved["epoch"] + 1

    for epoch in range(first_epoch, 10):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs.to(device)), targets.to(device))
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
            optimizer.step()
        if dist.get_rank() == 0:
            snapshot.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": model.module.state_dict(), "epoch": epoch}, snapshot)
    loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} done, loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
