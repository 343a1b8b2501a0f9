"""The settings of the training script, each described once. A flag wins over its variable, that over the default.

Also what needs no torch: how the script speaks, refuses and leaves.
"""

import argparse
import difflib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

LAUNCHER_VARIABLES = {"TRAIN_SCRIPT", "TRAIN_ARGS"}
"""They choose the script, so they belong to the launcher; this script only has to let them pass."""
REFUSAL_SECONDS = 5.0
"""Until a rank that torchrun does not end leaves by itself."""
_T = TypeVar("_T")


class TrainError(Exception):
    """The user must change something: one short message, exit code 2, no traceback."""


def say(text: str) -> None:
    """One line of output, written whole so that ranks do not mix theirs."""
    print(f"{text}\n", end="", flush=True)


def reached(part: str) -> None:
    """Tells a launcher that wants to know how long each part of a restart takes. Never raises OSError."""
    file = os.environ.get("TORCHRUN_COMPOSE_MARKS", "")
    if file and os.environ.get("LOCAL_RANK") == "0":
        with suppress(OSError), Path(file).open("a", encoding="utf-8") as stream:
            stream.write(f"{part} {time.time()}\n")


def refuse(error: TrainError) -> NoReturn:
    """Says on every node what is wrong, and leaves with the exit code for it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(error, file=sys.stderr, flush=True)
    else:
        # The first rank to end has torchrun end the others, and local rank 0 must have spoken before.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.sigtimedwait({signal.SIGTERM}, REFUSAL_SECONDS)
    leave(2)


def leave(code: int) -> NoReturn:
    """Ends the process without taking the interpreter down.

    A Gloo thread that lets go of its last work then still needs the GIL: CPython before 3.14 ends such a thread inside
    a C++ destructor (SIGABRT), and freeing the process group waits for that thread with the GIL held (a hang).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _setting(default: _T, text: str, least: float | None = None, *, choices: str = "", variable: str = "") -> _T:
    metadata = {"help": text, "least": least, "choices": tuple(choices.split()), "variable": variable}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """What one run is asked to do. Counts of sequences are global: they do not depend on the number of ranks."""

    steps: int = _setting(200, "optimizer steps in all, those before a resume included", 1)
    batch: int = _setting(32, "sequences per step over all ranks together", 1)
    micro_batch: int = _setting(16, "sequences per rank in one forward; a larger share is accumulated", 1)
    context: int = _setting(128, "tokens per sequence", 1)
    layers: int = _setting(4, "transformer blocks", 1)
    heads: int = _setting(4, "attention heads per block", 1)
    width: int = _setting(128, "model width, a multiple of heads", 1)
    vocab: int = _setting(256, "token values; 256 for text, which is read as bytes", 2)
    lr: float = _setting(1e-3, "peak learning rate", 0)
    min_lr: float = _setting(0.1, "learning rate at the last step, as a share of the peak", 0)
    warmup: int = _setting(10, "steps of linear warm-up before the cosine", 0)
    weight_decay: float = _setting(0.1, "AdamW weight decay of matrices", 0)
    clip: float = _setting(1.0, "largest gradient norm; 0 does not clip", 0)
    seed: int = _setting(0, "seed of the weights and of the data order", 0)
    log_every: int = _setting(10, "steps between two lines", 1)
    eval_every: int = _setting(100, "steps between two evaluations on held-out text; 0 for never", 0)
    eval_sequences: int = _setting(64, "held-out sequences per evaluation, over all ranks together", 1)
    sample: int = _setting(200, "bytes of text to generate at the end; 0 for none", 0)
    checkpoint_every: int = _setting(50, "steps between two checkpoints; 0 for one at the end only", 0)
    keep: int = _setting(2, "complete checkpoints kept on every disk", 1)
    sharding: str = _setting("ddp", "ddp copies the model to every rank, fsdp shards it", choices="ddp fsdp")
    precision: str = _setting("auto", "auto is bf16 where the GPU has it", choices="auto fp32 bf16")
    compile: bool = _setting(False, "compile the model with torch.compile", choices="true false 1 0")
    device: str = _setting("auto", "auto is cuda where there is a GPU", choices="auto cpu cuda")
    profile: int = _setting(0, "first of three steps to trace into RUN_DIR/trace-rank-*.json; 0 for none", 0)
    timeout: int = _setting(600, "seconds after which a collective that does not end is an error", 1)
    data: str = _setting("", "text or .bin token file, or a folder of them; empty: Python's own", variable="DATA")
    run_dir: str = _setting("runs/default", "folder for metrics and pictures", variable="RUN_DIR")
    checkpoint_dir: str = _setting("", "empty is RUN_DIR/checkpoints", variable="CHECKPOINT_DIR")

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return Path(self.checkpoint_dir or Path(self.run_dir, "checkpoints"))


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> TrainSettings:
    """Settings from flags and variables; an empty variable counts as unset.

    Raises:
        TrainError: a value or a name is wrong; the message lists every mistake.
    """
    variables = {item.name: item.metadata["variable"] or f"TRAIN_{item.name.upper()}" for item in fields(TrainSettings)}
    flags, values, problems = _flags(argv, variables), dict[str, Any](), list[str]()
    known = [*variables.values(), *LAUNCHER_VARIABLES]
    for name in sorted(name for name in environ if name.startswith("TRAIN_") and name not in known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        problems.append(f"{name}={environ[name]}: there is no such setting. Did you mean {near[0]}? See --help.")
    for item in fields(TrainSettings):
        source, text = f"--{item.name.replace('_', '-')} ", flags[item.name]
        if text is None:
            source, text = f"{variables[item.name]}=", environ.get(variables[item.name], "")
        try:
            if text:
                values[item.name] = _convert(item, text)
        except ValueError as error:
            problems.append(f"{source}{text}: expected {error}.")
    settings = TrainSettings(**values)
    if settings.width % settings.heads:
        problems.append(f"width={settings.width} is not a multiple of heads={settings.heads}: change one of them.")
    if problems:
        raise TrainError("\n".join(problems))
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TrainError(f"{message}. See --help.")


def _flags(argv: Sequence[str], variables: Mapping[str, str]) -> dict[str, str | None]:
    text = "Train a small GPT. A flag wins over the variable in brackets, the variable over its default."
    parser = _Parser(prog="torchrun -m app.train", description=text, allow_abbrev=False)
    for item in fields(TrainSettings):
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if item.type is bool else {}
        kind = "|".join(item.metadata["choices"]) or type(item.default).__name__.upper()
        about = f"{item.metadata['help']} [{variables[item.name]}={str(item.default).lower()}]"
        parser.add_argument(f"--{item.name.replace('_', '-')}", metavar=kind, help=about, **switch)
    return vars(parser.parse_args(argv))


def _convert(item: Field[Any], text: str) -> object:
    choices, least = item.metadata["choices"], item.metadata["least"]
    if choices and text not in choices:
        raise ValueError(f"one of {', '.join(choices)}")
    if least is None:
        return text in {"true", "1"} if item.type is bool else text
    with suppress(ValueError):
        value = int(text) if item.type is int else float(text)
        if value >= least:
            return value
    raise ValueError(f"{'a whole number' if item.type is int else 'a number'}, at least {least}")
