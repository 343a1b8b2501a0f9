"""The usual DDP tutorial: rank 0 saves snapshot.pt in the current folder every epoch, and all ranks begin with it."""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EPOCHS = int(os.environ.get("EPOCHS", "10"))
SNAPSHOT = "snapshot.pt"


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    data = TensorDataset(x, x @ torch.arange(8.0).unsqueeze(1))
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    model = DistributedDataParallel(nn.Linear(8, 1).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    first = 0
    if os.path.exists(SNAPSHOT):
        snapshot = torch.load(SNAPSHOT, map_location=device)
        model.module.load_state_dict(snapshot["model"])
        first = snapshot["epoch"] + 1
    print(f"rank {dist.get_rank()} begins at epoch {first}", flush=True)
    for epoch in range(first, EPOCHS):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(model(inputs.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if dist.get_rank() == 0:
            torch.save({"model": model.module.state_dict(), "epoch": epoch}, SNAPSHOT)
        print(f"rank {dist.get_rank()} epoch {epoch} loss {loss.item():.6f}", flush=True)
        time.sleep(float(os.environ.get("PAUSE", "0")))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
