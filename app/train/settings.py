"""The settings of the training script, each described once. A flag wins over its variable, that over the default."""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

LAUNCHER_VARIABLES = {"TRAIN_SCRIPT", "TRAIN_ARGS"}
"""They choose the script, so they belong to the launcher; this script only has to let them pass."""


REFUSAL_SECONDS = 5.0
_T = TypeVar("_T")


class UserError(Exception):
    """The user must change something: one short message, exit code 2, no traceback."""


def refuse(error: UserError) -> int:
    """Says on every node what is wrong, and returns the exit code for it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(error, file=sys.stderr, flush=True)
    else:
        # The first rank to end has torchrun end the others, and local rank 0 must have spoken before.
        time.sleep(REFUSAL_SECONDS)
    return 2


def _setting(default: _T, text: str, *, choices: tuple[str, ...] = (), variable: str = "") -> _T:
    return field(default=default, metadata={"help": text, "choices": choices, "variable": variable})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one run is asked to do. Counts of sequences are global: they do not depend on the number of ranks."""

    steps: int = _setting(200, "optimizer steps in all, those before a resume included")
    batch: int = _setting(32, "sequences per step over all ranks together")
    micro_batch: int = _setting(16, "sequences per rank in one forward; a larger share is accumulated")
    context: int = _setting(128, "tokens per sequence")
    layers: int = _setting(4, "transformer blocks")
    heads: int = _setting(4, "attention heads per block")
    width: int = _setting(128, "model width, a multiple of heads")
    vocab: int = _setting(256, "token values; 256 for text, which is read as bytes")
    lr: float = _setting(1e-3, "peak learning rate")
    min_lr: float = _setting(0.1, "learning rate at the last step, as a share of the peak")
    warmup: int = _setting(10, "steps of linear warm-up before the cosine")
    weight_decay: float = _setting(0.1, "AdamW weight decay of matrices")
    clip: float = _setting(1.0, "largest gradient norm; 0 does not clip")
    seed: int = _setting(0, "seed of the weights and of the data order")
    log_every: int = _setting(10, "steps between two lines")
    eval_every: int = _setting(100, "steps between two evaluations on held-out text; 0 for never")
    eval_sequences: int = _setting(64, "held-out sequences per evaluation, over all ranks together")
    sample: int = _setting(200, "bytes of text to generate at the end; 0 for none")
    checkpoint_every: int = _setting(50, "steps between two checkpoints; 0 for one at the end only")
    keep: int = _setting(2, "complete checkpoints kept on every disk, at least 1")
    sharding: str = _setting("ddp", "ddp copies the model to every rank, fsdp shards it", choices=("ddp", "fsdp"))
    precision: str = _setting("auto", "auto is bf16 where the GPU has it", choices=("auto", "fp32", "bf16"))
    compile: bool = _setting(False, "compile the model with torch.compile")
    device: str = _setting("auto", "auto is cuda where there is a GPU", choices=("auto", "cpu", "cuda"))
    profile: int = _setting(0, "first of three steps to trace into RUN_DIR/trace-rank-*.json; 0 for none")
    timeout: int = _setting(600, "seconds after which a collective that does not end is an error")
    data: str = _setting(
        "", "text or .bin token file, or a folder of them; empty is Python's own source", variable="DATA"
    )
    run_dir: str = _setting("runs/default", "folder for metrics and pictures", variable="RUN_DIR")
    checkpoint_dir: str = _setting(
        "", "folder for checkpoints; empty is RUN_DIR/checkpoints", variable="CHECKPOINT_DIR"
    )

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return Path(self.checkpoint_dir) if self.checkpoint_dir else Path(self.run_dir, "checkpoints")


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Settings from flags and variables; an empty variable counts as unset.

    Raises:
        UserError: a value or a name is wrong; the message lists every mistake.
    """
    flags = vars(_parser().parse_args(argv))
    problems = [*_misspelt(environ)]
    values: dict[str, object] = {}
    for item in fields(Settings):
        source, text = f"--{item.name.replace('_', '-')} ", flags[item.name]
        if text is None:
            source, text = f"{_variable(item)}=", environ.get(_variable(item), "")
        try:
            if text:
                values[item.name] = _convert(item, text)
        except ValueError as error:
            problems.append(f"{source}{text}: {error}.")
    if not problems:
        settings = Settings(**values)  # type: ignore[arg-type]  # converted by the annotation of each field
        problems = _contradictions(settings)
    if problems:
        raise UserError("\n".join(problems))
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchrun -m app.train",
        description="Train a small GPT. A flag wins over the variable in brackets, the variable over its default.",
        allow_abbrev=False,
    )
    for item in fields(Settings):
        help_text = f"{item.metadata['help']} [{_variable(item)}={_shown(item.default)}]"
        is_switch = _types()[item.name] is bool
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            metavar="|".join(item.metadata["choices"]) or _types()[item.name].__name__.upper(),
            help=help_text,
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
        )
    return parser


def _variable(item: Field[Any]) -> str:
    return item.metadata["variable"] or f"TRAIN_{item.name.upper()}"


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _types() -> dict[str, type]:
    return get_type_hints(Settings)


def _convert(item: Field[Any], text: str) -> object:
    kind, choices = _types()[item.name], item.metadata["choices"]
    if choices and text not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}")
    if kind is bool:
        if text.lower() not in {"true", "false", "1", "0"}:
            raise ValueError("expected true or false")
        return text.lower() in {"true", "1"}
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}") from None


def _misspelt(environ: Mapping[str, str]) -> list[str]:
    known = {_variable(item) for item in fields(Settings)} | LAUNCHER_VARIABLES
    problems = []
    for name in sorted(name for name in environ if name.startswith("TRAIN_") and name not in known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        problems.append(f"{name}={environ[name]}: there is no such setting. Did you mean {near[0]}? See --help.")
    return problems


def _contradictions(settings: Settings) -> list[str]:
    at_least = dict.fromkeys(("steps", "batch", "micro_batch", "context", "layers", "heads", "width", "log_every"), 1)
    at_least |= dict.fromkeys(("keep", "timeout", "eval_sequences"), 1)
    at_least |= dict.fromkeys(("warmup", "seed", "eval_every", "sample", "checkpoint_every", "profile"), 0)
    at_least |= dict.fromkeys(("lr", "min_lr", "weight_decay", "clip"), 0) | {"vocab": 2}
    problems = [
        f"{name}={getattr(settings, name)}: must be at least {bound}."
        for name, bound in at_least.items()
        if not getattr(settings, name) >= bound
    ]
    if not problems and settings.width % settings.heads:
        problems.append(f"width={settings.width} is not a multiple of heads={settings.heads}: change one of them.")
    return problems
