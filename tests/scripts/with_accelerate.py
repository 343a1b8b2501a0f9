"""A script in the style of Hugging Face Accelerate's documentation. It knows nothing of this project."""

import os

import torch
from accelerate import Accelerator  # type: ignore[import-not-found]  # a package of the user's image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """Fits a plane; the last line it prints is the loss."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, generator=generator)
    loader = DataLoader(TensorDataset(x, x @ torch.arange(8.0).unsqueeze(1)), batch_size=32, shuffle=True)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(10):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
    accelerator.save_state(os.path.join(os.environ.get("CHECKPOINT_DIR", "."), "accelerate"))  # noqa: PTH118  # its style
    print(f"rank {accelerator.process_index} of {accelerator.num_processes} done, loss {loss.item():.6f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
