"""Command lines of other launchers in TRAIN_SCRIPT: the script in them, or what to write instead."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.config.parsers import Malformed


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwrapped:
    words: tuple[str, ...]
    """The script (or -m and a module) and its arguments."""
    left_out: str = ""
    """The launcher that stood before it."""
    wrong: Malformed | None = None
    """Why it cannot be started like this, and what to write."""


TORCHRUN = re.compile(r"(.*/)?torchrun")
PYTHON = re.compile(r"(.*/)?python[0-9.]*")
TORCH_MODULES = ("torch.distributed.run", "torch.distributed.launch", "torch.distributed.launcher")
SWITCHES = frozenset({"--standalone", "--multi_gpu", "--multi-gpu", "--same_network", "-q", "--quiet", "--use-env"})
"""Options without a value of torchrun, accelerate and deepspeed that ask for nothing that is not done here anyway."""
SETTINGS: Mapping[str, str] = {
    "nproc_per_node": "NPROC_PER_NODE",
    "num_gpus": "NPROC_PER_NODE",
    "nnodes": "NNODES",
    "num_nodes": "NNODES",
    "num_machines": "NNODES",
    "node_rank": "NODE_RANK",
    "machine_rank": "NODE_RANK",
    "master_addr": "MASTER_ADDR",
    "main_process_ip": "MASTER_ADDR",
    "master_port": "MASTER_PORT",
    "main_process_port": "MASTER_PORT",
    "max_restarts": "MAX_RESTARTS",
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
}
"""Options of torchrun, accelerate and deepspeed by the variables that stand for them here."""
MODULES: Mapping[str, str] = {"trl": "trl.scripts", "axolotl": "axolotl.cli"}
"""Programs whose sub-commands start a launcher of their own, and the package that has each as a module."""
SELF_LAUNCHING = frozenset({"mpirun", "mpiexec", "srun", "horovodrun", "composer", "colossalai", "fabric", "lightning"})


def unwrap(words: Sequence[str]) -> Unwrapped:
    """The script in a command line as people have it in their shell's history."""
    first = words[0].rpartition("/")[2] if words else ""
    if PYTHON.fullmatch(first):
        return _python(words)
    if TORCHRUN.fullmatch(first) or (words[:1] == ["-m"] and len(words) > 1 and words[1] in TORCH_MODULES):
        return _launcher("torchrun", words[2:] if words[0] == "-m" else words[1:])
    if first == "accelerate" and words[1:2] == ["launch"]:
        return _launcher("accelerate launch", words[2:])
    if first == "deepspeed":
        return _launcher("deepspeed", words[1:])
    if first in MODULES and len(words) > 1:
        module = [f"{MODULES[first]}.{words[1]}", *words[2:]]
        return _instead(words, first, f"-m {shlex.join(module)}")
    if first in SELF_LAUNCHING:
        return _instead(words, first, "the script and its arguments alone")
    return Unwrapped(words=tuple(words))


def _python(words: Sequence[str]) -> Unwrapped:
    rest = list(words[1:])
    while rest[:1] == ["-u"]:
        del rest[0]
    if not rest or (rest[0].startswith("-") and rest[0] != "-m"):
        return Unwrapped(words=tuple(words), wrong=Malformed("python-options"))
    inner = unwrap(rest)
    return Unwrapped(words=inner.words, left_out=inner.left_out or words[0], wrong=inner.wrong)


def _launcher(name: str, words: Sequence[str]) -> Unwrapped:
    options, script = _split(words)
    if not script:
        return _instead(words, name, "the script and its arguments alone")
    asked = [option for option in options if option.partition("=")[0] not in SWITCHES]
    if not asked:
        return Unwrapped(words=script, left_out=name)
    variables, others = _variables(asked)
    write = " ".join([f"TRAIN_SCRIPT={shlex.quote(shlex.join(script))}", *variables])
    rest = f". For {', '.join(others)} see docs/own-script.md" if others else ""
    return Unwrapped(words=script, wrong=Malformed("other-launcher", launcher=name, needless=True, write=write + rest))


def _split(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The launcher's own options, and the script with its arguments: from -m, or from the first name that is no option
    and no option's value."""
    options: list[str] = []
    for index, word in enumerate(words):
        if word in ("-m", "--module"):
            module = next((at for at, each in enumerate(words) if at > index and not each.startswith("-")), None)
            return options, () if module is None else ("-m", *words[module:])
        before = words[index - 1] if index else ""
        value = before.startswith("-") and "=" not in before and before not in SWITCHES
        if not word.startswith("-") and (word.endswith(".py") or not value):
            return options, tuple(words[index:])
        options.append(word)
    return options, ()


def _variables(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """`NAME=value` of each option that has a variable, and the options that have none."""
    known, others = [], []
    for index, option in enumerate(options):
        if not option.startswith("-"):
            continue
        name, _, value = option.partition("=")
        value = value or next((each for each in options[index + 1 : index + 2] if not each.startswith("-")), "")
        variable = SETTINGS.get(name.lstrip("-").replace("-", "_"))
        if variable and value:
            known.append(f"{variable}={shlex.quote(value)}")
        else:
            others.append(name)
    return known, others


def _instead(words: Sequence[str], name: str, write: str) -> Unwrapped:
    wrong = Malformed("other-launcher", launcher=name, needless=False, write=write)
    return Unwrapped(words=tuple(words), wrong=wrong)
