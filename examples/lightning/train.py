"""Lightning's Trainer: last.ckpt of ModelCheckpoint, resumed where it is there."""

import os
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FOLDER = Path(os.environ.get("CHECKPOINT_DIR", "checkpoints"))


class Plane(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 1)

    def on_train_start(self) -> None:
        print(f"rank {self.global_rank} begins at step {self.global_step}", flush=True)

    def training_step(self, batch, _index):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        print(f"rank {self.global_rank} step {self.global_step} loss {loss.item():.6f}", flush=True)
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def main() -> None:
    L.seed_everything(0)
    x = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(x, x @ torch.arange(8.0).unsqueeze(1)), batch_size=32, shuffle=True)
    last = FOLDER / "last.ckpt"
    trainer = L.Trainer(
        # The two lines that map: as many nodes and processes as torchrun has started.
        num_nodes=int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"]),
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        accelerator="auto",
        strategy="ddp",
        max_steps=int(os.environ.get("STEPS", "40")),
        callbacks=[ModelCheckpoint(dirpath=FOLDER, save_last=True, every_n_train_steps=10, save_top_k=1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Plane(), loader, ckpt_path=str(last) if last.exists() else None)


if __name__ == "__main__":
    main()
