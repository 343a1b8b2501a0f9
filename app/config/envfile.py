"""The `.env` file as values that remember their line, under the process environment."""

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dotenv.parser import parse_stream

from app.config.problems import Problem, problem
from app.config.values import Value, plain

MOUNTED = Path("/etc/torchrun-compose/.env")
"""Where compose.yaml mounts the node's `.env`. Its values arrive through the environment; the file only names lines."""


COMPOSE = "compose.yaml"
"""The source of a value that nobody set: compose.yaml gives it to every container."""
FROM_COMPOSE = {
    "CLUSTER_TOKEN_FILE": "/run/secrets/cluster_token",
    "PYTHONUNBUFFERED": "1",
    "RUNS": "runs",
    "RUNS_ROOT": "/runs",
    "STOPPED_EXIT_CODE": "0",
    "WORKSPACE": "./workspace",
}
SECRETS = Path("secrets/env")
"""Beside `.env`: variables that no output of ours shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvFile:
    values: Mapping[str, Value[str]]
    problems: tuple[Problem, ...] = ()


def read_env_file(path: Path | None) -> EnvFile:
    """Values of a `.env` file and of `secrets/env` beside it, without interpolation; the last of several lines for one
    name wins, and `.env` over the secrets.

    A file that cannot be read is a problem, except the one that compose mounts: there only the line numbers are lost.
    """
    if path is None:
        return EnvFile(values={})
    own = _read(path, path.name, optional=path == MOUNTED)
    secrets = _read(path.parent / SECRETS, str(SECRETS))
    hidden = {name: replace(value, secret=True) for name, value in secrets.values.items()}
    return EnvFile(values={**hidden, **own.values}, problems=(*own.problems, *secrets.problems))


def _read(path: Path, name: str, *, optional: bool = False) -> EnvFile:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return EnvFile(values={})
    except (OSError, UnicodeDecodeError) as error:
        found = () if optional else (_unreadable(path, error),)
        return EnvFile(values={}, problems=found)
    return _parse(text, name)


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> Problem:
    why, remedy = getattr(error, "strerror", ""), "Make it readable by this user"
    if isinstance(error, UnicodeDecodeError):
        why, remedy = "it is not UTF-8 text", "Save it as UTF-8"
    elif isinstance(error, IsADirectoryError):
        why, remedy = "it is a folder", "Write lines of the form NAME=value into a file"
    return problem("settings.env-file-unreadable", setting="ENV_FILE", path=path, why=why, remedy=remedy)


def _parse(text: str, name: str) -> EnvFile:
    values: dict[str, Value[str]] = {}
    problems: list[Problem] = []
    for binding in parse_stream(io.StringIO(text)):
        # The parser's mark stands before blank lines that it skips on its way to the name.
        raw = binding.original.string
        line = binding.original.line + raw[: len(raw) - len(raw.lstrip())].count("\n")
        source = f"{name}:{line}"
        # No environment can hold a NUL.
        if binding.error or (binding.key is not None and binding.value is None) or "\0" in raw:
            # The line's text is left out: it may hold a secret.
            problems.append(problem("settings.env-file-line", setting="ENV_FILE", source=source))
        elif binding.key is not None and binding.value is not None:
            values[binding.key] = plain(binding.key, binding.value, source)
    return EnvFile(values=values, problems=tuple(problems))


def merge(
    environ: Mapping[str, str], file: EnvFile, path: Path | None = None, may_be_empty: Collection[str] = ()
) -> dict[str, Value[str]]:
    """All variables that are set: the environment over the file, without surrounding spaces.

    A value that is equal in both is the file's line, since Compose hands `.env` over as environment. An empty value
    is unset, also when it stands in the environment over a line of the file; the names that `may_be_empty` are not
    unset by it. Under the `path` that Compose mounts, the environment holds its own values too.
    """
    given = FROM_COMPOSE if path == MOUNTED else {}
    merged = dict(file.values)
    for name, text in environ.items():
        line = file.values.get(name)
        source = COMPOSE if given.get(name) == text else "environment"
        merged[name] = line if line is not None and line.text == text else plain(name, text, source)
    return {
        name: replace(value, text=text, value=text)
        for name, value in merged.items()
        if (text := value.text.strip()) or name in may_be_empty
    }
