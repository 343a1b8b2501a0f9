"""The settings of a launch: one table of names, and the values of one node with their sources.

`.env.example` describes each name of the table once; a test keeps the two, and compose.yaml, equal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from app.config.envfile import merge, read_env_file
from app.config.parsers import (
    Malformed,
    bare,
    byte_count,
    duration,
    entries,
    listener,
    modules,
    number_or_all,
    one_of,
    path,
    processes,
    run_name,
    seconds,
    services,
    shell_words,
    whole_number,
)
from app.config.problems import Problem, problem
from app.config.values import Value, plain

T = TypeVar("T")
Scope = Literal["cluster", "node", "worker", "compose", "desk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One line of the table."""

    name: str = ""
    parse: Callable[[str], object]
    default: str | None = None
    scope: Scope
    """`cluster`: what it means must be equal on all nodes. `node`: may differ. `worker`: handed to the workers.
    `compose`: only compose.yaml reads it. `desk`: only `torchrun-compose` on the desk."""
    check: str
    """Where doctor shows a wrong value, as in `app.config.problems`."""
    may_be_empty: bool = False
    """An empty value is one, and not the default."""
    secret: bool = False
    """Whoever has the value can use it: nothing shows it."""


def setting(
    parse: Callable[[str], T],
    default: str,
    scope: Scope = "cluster",
    check: str = "settings",
    *,
    may_be_empty: bool = False,
) -> Value[T]:
    """A line of the table; its name is that of the field in capitals."""
    line = Setting(parse=parse, default=default, scope=scope, check=check, may_be_empty=may_be_empty)
    found: Any = field(metadata={"setting": line})
    return found  # type: ignore[no-any-return]  # a field stands for what it will hold, as in dataclasses.field


def optional(
    parse: Callable[[str], T], scope: Scope = "cluster", check: str = "settings", *, secret: bool = False
) -> Value[T] | None:
    """The same without a default."""
    line = Setting(parse=parse, scope=scope, check=check, secret=secret)
    found: Any = field(default=None, metadata={"setting": line})
    return found  # type: ignore[no-any-return]  # as above


PORT = whole_number(1, 65535)
SWITCH = one_of("0", "1")
HARDWARE = ("cpu", "nvidia", "nvidia-ib", "cdi", "rocm")
"""Each is a file in hardware/."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked for on this node. Wrong values are in `problems`, and read as unset."""

    nodes: Value[tuple[str, ...]] | None = optional(entries, check="rank")
    node_rank: Value[int] | None = optional(whole_number(0), scope="node", check="rank")
    nnodes: Value[int] | None = optional(whole_number(1), check="rank")
    master_addr: Value[str] | None = optional(bare, scope="node", check="rank")
    master_port: Value[int] = setting(PORT, "29400", check="ports")
    control_port: Value[int] | None = optional(PORT, check="ports")
    nproc_per_node: Value[int | str] = setting(processes, "auto", check="gpus")
    run_name: Value[str] = setting(run_name, "default")
    hardware: Value[str] | None = optional(one_of(*HARDWARE), scope="node", check="gpus")
    backend: Value[str] = setting(one_of("auto", "gloo", "nccl"), "auto", check="gpus")
    train_script: Value[tuple[str, ...]] = setting(shell_words, "-m app.train")
    train_args: Value[tuple[str, ...]] | None = optional(shell_words)
    preload: Value[tuple[str, ...]] = setting(modules, "torch", scope="node", may_be_empty=True)
    runs_root: Value[Path] = setting(path, "runs", scope="node")
    run_dir: Value[Path] | None = optional(path, scope="node")
    checkpoint_dir: Value[Path] | None = optional(path, scope="node")
    checkpoints: Value[str] = setting(one_of("mirror", "own"), "mirror")
    mirror_keep: Value[int | None] = setting(number_or_all, "2")
    mirror_limit: Value[int] = setting(byte_count, "100GB")
    data: Value[str] | None = optional(str, scope="node")
    log_bytes: Value[int] = setting(whole_number(0), "100000000", scope="node")
    start_timeout: Value[float] = setting(seconds(1), "300")
    min_nodes: Value[int] | None = optional(whole_number(1))
    spares: Value[int] = setting(whole_number(0), "0")
    regrow: Value[str] = setting(one_of("checkpoint", "failure"), "checkpoint")
    max_restarts: Value[int] = setting(whole_number(0), "3")
    rejoin_timeout: Value[float] = setting(seconds(1), "120")
    stop_grace: Value[float] = setting(seconds(0), "30")
    heartbeat_timeout: Value[float] = setting(seconds(1), "8")
    hang_report: Value[float] = setting(seconds(0), "60")
    hang_timeout: Value[float] | None = optional(seconds(1))
    metrics_port: Value[tuple[str, int]] | None = optional(listener, scope="node", check="ports")
    notify: Value[tuple[str, ...]] | None = optional(services, scope="node", secret=True)
    cluster_token_file: Value[Path] | None = optional(path, scope="node")
    stopped_exit_code: Value[int] = setting(whole_number(0, 255), "143", scope="node")
    nccl_socket_ifname: Value[str] | None = optional(str, scope="worker")
    gloo_socket_ifname: Value[str] | None = optional(str, scope="worker")
    nccl_ib_disable: Value[str] | None = optional(SWITCH, scope="worker")
    nccl_ib_hca: Value[str] | None = optional(str, scope="worker")
    nccl_debug: Value[str] | None = optional(str, scope="worker")
    nccl_ras_addr: Value[str] | None = optional(str, scope="worker")
    gloo_ib_disable: Value[str] | None = optional(str, scope="worker")
    omp_num_threads: Value[int] | None = optional(whole_number(1), scope="worker")
    cuda_launch_blocking: Value[str] | None = optional(SWITCH, scope="worker")
    pythonunbuffered: Value[str] | None = optional(str, scope="worker")
    torch_fr_dump_temp_file: Value[str] | None = optional(str, scope="worker")
    env_file: Value[str] | None = optional(str, scope="compose")
    image: Value[str] | None = optional(str, scope="compose")
    base_image: Value[str] | None = optional(str, scope="compose")
    torch: Value[str] | None = optional(one_of("base", "cpu", "cuda", "rocm"), scope="compose")
    wheelhouse: Value[str] | None = optional(str, scope="compose")
    render_group: Value[str] | None = optional(str, scope="compose")
    runs: Value[str] | None = optional(str, scope="compose")
    run_as: Value[str] | None = optional(str, scope="compose")
    workspace: Value[str] | None = optional(str, scope="compose")
    workspace_read_only: Value[str] | None = optional(str, scope="compose")
    data_dir: Value[str] | None = optional(str, scope="compose")
    shm_size: Value[str] | None = optional(str, scope="compose")
    tmp_size: Value[str] | None = optional(str, scope="compose")
    restart: Value[str] | None = optional(str, scope="compose")
    stop_grace_period: Value[float | None] = setting(duration, "60s", scope="compose")
    tensorboard_port: Value[str] | None = optional(str, scope="compose")
    hosts: Value[tuple[str, ...]] | None = optional(entries, scope="desk")
    host_dir: Value[Path] = setting(path, "torchrun-compose", scope="desk")

    values: Mapping[str, Value[str]] = field(repr=False)
    """Every variable that is set, documented or not, without its surrounding spaces; secrets of the user's included."""
    given: frozenset[str] = frozenset()
    """Names in the process environment, those with an empty value included."""
    argv: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def of(self, name: str) -> Value[Any] | None:
        """The value of a setting of the table by its name, defaults included."""
        found: Value[Any] | None = getattr(self, name.lower())
        return found

    def text(self, name: str) -> str:
        """The text of any variable as it was given; "" if it was not."""
        value = self.values.get(name)
        return "" if value is None else value.text

    def is_set(self, name: str) -> bool:
        return name in self.values


def _table() -> tuple[Setting, ...]:
    found = [(each.name.upper(), each.metadata["setting"]) for each in fields(Settings) if each.metadata]
    return tuple(replace(each, name=name) for name, each in found)


TABLE = _table()
BY_NAME: Mapping[str, Setting] = {each.name: each for each in TABLE}


def read_settings(environ: Mapping[str, str], env_file: Path | None, argv: Sequence[str] = ()) -> Settings:
    """The settings of this process: the environment over `env_file` over the defaults.

    Never raises for a user's mistake: everything that is wrong is in `Settings.problems`.
    """
    file = read_env_file(env_file)
    merged = merge(environ, file, env_file, [each.name for each in TABLE if each.may_be_empty])
    problems = [*file.problems, *_missing_file(environ, env_file)]
    parsed: dict[str, Any] = {}
    for each in TABLE:
        if each.secret and each.name in merged:
            merged[each.name] = replace(merged[each.name], secret=True)
        value = merged.get(each.name)
        try:
            if value is not None:
                parsed[each.name.lower()] = Value(
                    name=each.name,
                    text=value.text,
                    source=value.source,
                    value=each.parse(value.text),
                    secret=value.secret,
                )
        except Malformed as wrong:
            problems.append(refused(wrong, merged.pop(each.name), each.check))
    defaults = {each.name.lower(): _default(each, each.default) for each in TABLE if each.default is not None}
    broken = {each.setting for each in problems}
    return Settings(
        values={name: value for name, value in merged.items() if name not in broken},
        given=frozenset(environ),
        argv=tuple(argv),
        problems=tuple(problems),
        **{**defaults, **parsed},
    )


def _default(each: Setting, text: str) -> Value[Any]:
    return Value(name=each.name, text=text, source="default", value=each.parse(text))


def refused(wrong: Malformed, given: Value[Any], check: str) -> Problem:
    """A value that means nothing, as a problem."""
    return problem(f"{check}.{wrong.id}", given=given, **wrong.values)


def _missing_file(environ: Mapping[str, str], env_file: Path | None) -> list[Problem]:
    # The image names a file that is there only if compose mounts one; only a user's own ENV_FILE must exist.
    if env_file is None or str(env_file) != environ.get("ENV_FILE") or env_file.is_relative_to("/etc/torchrun-compose"):
        return []
    if env_file.exists():
        return []
    return [problem("settings.env-file-missing", given=plain("ENV_FILE", str(env_file), "environment"))]
