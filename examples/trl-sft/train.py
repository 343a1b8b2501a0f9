"""TRL's SFTTrainer on a tiny random model and a tokenizer that is made here; no download."""

import os
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

FOLDER = os.environ.get("CHECKPOINT_DIR", "checkpoints")
WORDS = ["[UNK]", "[EOS]", *["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]]


class Tell(TrainerCallback):
    def on_train_begin(self, args, state, control, **_rest):
        print(f"rank {args.process_index} begins at step {state.global_step}", flush=True)

    def on_log(self, args, state, control, logs=None, **_rest):
        print(f"rank {args.process_index} step {state.global_step} {logs}", flush=True)

    def on_step_end(self, args, state, control, **_rest):
        time.sleep(float(os.environ.get("PAUSE", "0")))


def main() -> None:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=32, n_layer=2, n_head=2))
    data = Dataset.from_dict({"text": [" ".join(WORDS[2 + n % 8 : 5 + n % 8]) for n in range(4096)]})
    arguments = SFTConfig(
        output_dir=FOLDER,
        max_steps=int(os.environ.get("STEPS", "60")),
        max_length=16,
        per_device_train_batch_size=8,
        logging_steps=5,
        save_steps=10,
        save_total_limit=2,
        report_to="none",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Tell()]
    )
    has = Path(FOLDER).is_dir() and get_last_checkpoint(FOLDER)
    trainer.train(resume_from_checkpoint=has or None)


if __name__ == "__main__":
    main()
