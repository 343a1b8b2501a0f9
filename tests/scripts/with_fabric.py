"""A script in the style of Lightning Fabric's documentation, for torchrun. It knows nothing of this project."""

import os

import torch
from lightning_fabric import Fabric  # type: ignore[import-not-found]  # a package of the user's image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """Fits a plane; the last line it prints is the loss."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(accelerator="auto", strategy="ddp", devices=local, num_nodes=world // local)
    fabric.launch()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, generator=generator)
    loader = DataLoader(TensorDataset(x, x @ torch.arange(8.0).unsqueeze(1)), batch_size=32, shuffle=True)
    net = nn.Linear(8, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(loader)
    for _ in range(10):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            fabric.backward(loss)
            optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    fabric.save(os.path.join(os.environ.get("CHECKPOINT_DIR", "."), "fabric.ckpt"), state)  # noqa: PTH118  # its style
    print(f"rank {fabric.global_rank} of {fabric.world_size} done, loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
