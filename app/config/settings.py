"""The settings of a launch: one table of names, and the values of one node with their sources.

`.env.example` describes each name of the table once; a test keeps the two, and compose.yaml, equal.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.config.envfile import Value, merge, read_env_file
from app.config.errors import Problem, printable

Check = Callable[[str], str | None]
"""What is wrong with a text, as the end of a sentence that starts with `NAME=value (source)`; None if it is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    name: str
    default: str | None = None
    check: Check = lambda _text: None
    scope: str = "cluster"
    """`cluster`: must be equal on all nodes. `node`: may differ. `worker`: handed to the workers. `compose`: only
    compose.yaml reads it."""


def whole_number(low: int, high: int | None = None) -> Check:
    def check(text: str) -> str | None:
        span = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
            return f"is not a number. Write {span}."
        value = int(text)
        return None if value >= low and (high is None or value <= high) else f"is out of range. Write {span}."

    return check


def seconds(low: float) -> Check:
    def check(text: str) -> str | None:
        if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,3})?", text):
            return "is not a number of seconds, like 30 or 2.5."
        return None if float(text) >= low else f"is too short. Write at least {low:g} second{'' if low == 1 else 's'}."

    return check


def one_of(*words: str) -> Check:
    def check(text: str) -> str | None:
        return None if text in words else f"is unknown. Write one of {', '.join(words)}."

    return check


def run_name(text: str) -> str | None:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        return None
    return "is not a folder's name. Write up to 64 letters, digits, dots, dashes or underscores."


def processes(text: str) -> str | None:
    if text in ("auto", "gpu", "cpu") or (re.fullmatch(r"[0-9]{1,4}", text) and int(text) > 0):
        return None
    return "is neither a number of at least 1 nor auto, gpu or cpu."


def shell_words(text: str) -> str | None:
    try:
        shlex.split(text)
    except ValueError as error:
        return f"has broken shell quoting ({str(error).rstrip('.').lower()}). Close the quote or escape it with \\."
    return None


def path(text: str) -> str | None:
    return (
        "would be taken literally: ~ and $ are not expanded here. Write the whole path."
        if re.search(r"^~|\$", text)
        else None
    )


def entries(text: str) -> str | None:
    return None if re.fullmatch(r"[1-9][0-9]{0,5}|all", text) else "is neither a number of at least 1 nor all."


def size(text: str) -> str | None:
    known = re.fullmatch(r"[1-9][0-9]{0,5}[KMGT]B", text)
    return None if known else "is not a size, like 500MB, 100GB or 2TB."


PORT = whole_number(1, 65535)

TABLE: tuple[Setting, ...] = (
    Setting(name="NODES"),
    Setting(name="NODE_RANK", check=whole_number(0), scope="node"),
    Setting(name="NNODES", check=whole_number(1)),
    Setting(name="MASTER_ADDR"),
    Setting(name="MASTER_PORT", default="29400", check=PORT),
    Setting(name="CONTROL_PORT", check=PORT),
    Setting(name="NPROC_PER_NODE", default="auto", check=processes, scope="node"),
    Setting(name="RUN_NAME", default="default", check=run_name),
    Setting(name="HARDWARE", check=one_of("cpu", "nvidia", "nvidia-ib", "cdi"), scope="node"),
    Setting(name="BACKEND", default="auto", check=one_of("auto", "gloo", "nccl"), scope="node"),
    Setting(name="TRAIN_SCRIPT", default="-m app.train", check=shell_words),
    Setting(name="TRAIN_ARGS", check=shell_words),
    Setting(name="RUNS_ROOT", default="runs", check=path, scope="node"),
    Setting(name="RUN_DIR", check=path, scope="node"),
    Setting(name="CHECKPOINT_DIR", check=path, scope="node"),
    Setting(name="CHECKPOINTS", default="mirror", check=one_of("mirror", "own")),
    Setting(name="MIRROR_KEEP", default="2", check=entries),
    Setting(name="MIRROR_LIMIT", default="100GB", check=size),
    Setting(name="DATA", scope="node"),
    Setting(name="START_TIMEOUT", default="300", check=seconds(1)),
    Setting(name="MIN_NODES", check=whole_number(1)),
    Setting(name="MAX_RESTARTS", default="3", check=whole_number(0)),
    Setting(name="REJOIN_TIMEOUT", default="120", check=seconds(1)),
    Setting(name="STOP_GRACE", default="30", check=seconds(0)),
    Setting(name="HEARTBEAT_TIMEOUT", default="8", check=seconds(1)),
    Setting(name="HANG_REPORT", default="60", check=seconds(0)),
    Setting(name="HANG_TIMEOUT", check=seconds(1)),
    Setting(name="CLUSTER_TOKEN_FILE", check=path, scope="node"),
    Setting(name="STOPPED_EXIT_CODE", default="143", check=whole_number(0, 255), scope="node"),
    Setting(name="NCCL_SOCKET_IFNAME", scope="worker"),
    Setting(name="GLOO_SOCKET_IFNAME", scope="worker"),
    Setting(name="NCCL_IB_DISABLE", check=one_of("0", "1"), scope="worker"),
    Setting(name="NCCL_IB_HCA", scope="worker"),
    Setting(name="NCCL_DEBUG", scope="worker"),
    Setting(name="NCCL_RAS_ADDR", scope="worker"),
    Setting(name="GLOO_IB_DISABLE", scope="worker"),
    Setting(name="OMP_NUM_THREADS", check=whole_number(1), scope="worker"),
    Setting(name="CUDA_LAUNCH_BLOCKING", check=one_of("0", "1"), scope="worker"),
    Setting(name="PYTHONUNBUFFERED", scope="worker"),
    Setting(name="TORCH_FR_DUMP_TEMP_FILE", scope="worker"),
    Setting(name="ENV_FILE", scope="compose"),
    Setting(name="IMAGE", scope="compose"),
    Setting(name="BASE_IMAGE", scope="compose"),
    Setting(name="WHEELHOUSE", scope="compose"),
    Setting(name="RUNS", scope="compose"),
    Setting(name="WORKSPACE", scope="compose"),
    Setting(name="DATA_DIR", scope="compose"),
    Setting(name="SHM_SIZE", scope="compose"),
    Setting(name="RESTART", scope="compose"),
    Setting(name="STOP_GRACE_PERIOD", scope="compose"),
    Setting(name="TENSORBOARD_PORT", scope="compose"),
)
BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in TABLE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked for on this node. Wrong values are in `problems`, and read as unset."""

    values: Mapping[str, Value] = field(repr=False)
    """Every variable that is set, documented or not, without its surrounding spaces; secrets of the user's included."""
    given: frozenset[str] = frozenset()
    """Names in the process environment, those with an empty value included."""
    argv: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def get(self, name: str) -> Value | None:
        """The user's value, else the default; None if there is neither."""
        value = self.values.get(name)
        default = BY_NAME[name].default if name in BY_NAME else None
        if value is not None:
            return value
        return None if default is None else Value(text=default, source="default")

    def text(self, name: str) -> str:
        value = self.get(name)
        return "" if value is None else value.text

    def is_set(self, name: str) -> bool:
        return name in self.values


def read_settings(environ: Mapping[str, str], env_file: Path | None, argv: Sequence[str] = ()) -> Settings:
    """The settings of this process: the environment over `env_file` over the defaults.

    Never raises for a user's mistake: everything that is wrong is in `Settings.problems`.
    """
    file = read_env_file(env_file)
    merged = {name: _stripped(value) for name, value in merge(environ, file, env_file).items()}
    problems = [*file.problems, *_missing_file(environ, env_file), *_wrong_values(merged)]
    broken = {problem.setting for problem in problems}
    return Settings(
        values={name: value for name, value in merged.items() if name not in broken},
        given=frozenset(environ),
        argv=tuple(argv),
        problems=tuple(problems),
    )


def _stripped(value: Value) -> Value:
    return Value(text=value.text.strip(), source=value.source)


def _missing_file(environ: Mapping[str, str], env_file: Path | None) -> list[Problem]:
    # The image names a file that is there only if compose mounts one; only a user's own ENV_FILE must exist.
    if env_file is None or str(env_file) != environ.get("ENV_FILE") or env_file.is_relative_to("/etc/torchrun-compose"):
        return []
    if env_file.exists():
        return []
    message = f"ENV_FILE={env_file} (environment): there is no such file. Correct the path or unset ENV_FILE."
    return [Problem(setting="ENV_FILE", message=message)]


def _wrong_values(values: Mapping[str, Value]) -> list[Problem]:
    problems = []
    for setting in TABLE:
        value = values.get(setting.name)
        wrong = None if value is None else setting.check(value.text)
        if value is not None and wrong is not None:
            message = f"{setting.name}={printable(value.text)} ({value.source}) {wrong}"
            problems.append(Problem(setting=setting.name, message=message))
    return problems
