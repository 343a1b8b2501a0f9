"""Hugging Face Trainer on a tiny random GPT-2, resumed from its newest checkpoint; no download."""

import os
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

FOLDER = os.environ.get("CHECKPOINT_DIR", "checkpoints")


class Numbers(Dataset):
    """Sequences that count upwards."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + index) % 64
        return {"input_ids": tokens, "labels": tokens}


class Tell(TrainerCallback):
    def on_train_begin(self, args, state, control, **_rest):
        print(f"rank {args.process_index} begins at step {state.global_step}", flush=True)

    def on_log(self, args, state, control, logs=None, **_rest):
        print(f"rank {args.process_index} step {state.global_step} {logs}", flush=True)

    def on_step_end(self, args, state, control, **_rest):
        time.sleep(float(os.environ.get("PAUSE", "0")))


def main() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    arguments = TrainingArguments(
        output_dir=FOLDER,
        max_steps=int(os.environ.get("STEPS", "60")),
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=5,
        save_steps=10,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Numbers(), callbacks=[Tell()])
    has = Path(FOLDER).is_dir() and get_last_checkpoint(FOLDER)
    trainer.train(resume_from_checkpoint=has or None)


if __name__ == "__main__":
    main()
