"""The `.env` file as values that remember their line, under the process environment."""

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from dotenv.parser import parse_stream

from app.config.errors import Problem

MOUNTED = Path("/etc/torchrun-compose/.env")
"""Where compose.yaml mounts the node's `.env`. Its values arrive through the environment; the file only names lines."""


COMPOSE = "compose.yaml"
"""The source of a value that nobody set: compose.yaml gives it to every container."""
FROM_COMPOSE = {
    "CLUSTER_TOKEN_FILE": "/run/secrets/cluster_token",
    "PYTHONUNBUFFERED": "1",
    "RUNS_ROOT": "/runs",
    "STOPPED_EXIT_CODE": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """The text of one setting and where it came from."""

    text: str
    source: str
    """`.env:3`, `environment`, `compose.yaml`, `command line`, `default` or `detected`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvFile:
    values: Mapping[str, Value]
    problems: tuple[Problem, ...] = ()


def read_env_file(path: Path | None) -> EnvFile:
    """Values of a `.env` file, without interpolation; the last of several lines for one name wins.

    A file that cannot be read is a problem, except the one that compose mounts: there only the line numbers are lost.
    """
    if path is None:
        return EnvFile(values={})
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return EnvFile(values={})
    except (OSError, UnicodeDecodeError) as error:
        if path == MOUNTED:
            return EnvFile(values={})
        why = f"{path} cannot be read: {_why(error)}, or name another file with ENV_FILE."
        return EnvFile(values={}, problems=(Problem(setting="ENV_FILE", message=why),))
    return _parse(text, path)


def _why(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text. Save it as UTF-8"
    if isinstance(error, IsADirectoryError):
        return "it is a folder. Write lines of the form NAME=value into a file"
    return f"{error.strerror}. Make it readable by this user"


def _parse(text: str, path: Path) -> EnvFile:
    values: dict[str, Value] = {}
    problems: list[Problem] = []
    for binding in parse_stream(io.StringIO(text)):
        # The parser's mark stands before blank lines that it skips on its way to the name.
        raw = binding.original.string
        line = binding.original.line + raw[: len(raw) - len(raw.lstrip())].count("\n")
        source = f"{path.name}:{line}"
        if binding.error or (binding.key is not None and binding.value is None):
            # The line's text is left out: it may hold a secret.
            message = f"{source} is not a line of the form NAME=value. Correct it or put a # before it."
            problems.append(Problem(setting="ENV_FILE", message=message))
        elif binding.key is not None and binding.value is not None:
            values[binding.key] = Value(text=binding.value, source=source)
    return EnvFile(values=values, problems=tuple(problems))


def merge(
    environ: Mapping[str, str], file: EnvFile, path: Path | None = None, may_be_empty: Collection[str] = ()
) -> dict[str, Value]:
    """All variables that are set: the environment over the file.

    A value that is equal in both is the file's line, since Compose hands `.env` over as environment. An empty value
    is unset, also when it stands in the environment over a line of the file; the names that `may_be_empty` are not
    unset by it. Under the `path` that Compose mounts, the environment holds its own values too.
    """
    given = FROM_COMPOSE if path == MOUNTED else {}
    merged = dict(file.values)
    for name, text in environ.items():
        line = file.values.get(name)
        source = COMPOSE if given.get(name) == text else "environment"
        merged[name] = line if line is not None and line.text == text else Value(text=text, source=source)
    return {name: value for name, value in merged.items() if value.text.strip() or name in may_be_empty}
