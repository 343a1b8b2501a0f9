"""The table of known errors: one file for each layer below `layers/`, read only when something has failed."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("layers")
LAYERS = ("start", "gloo", "nccl", "gpu", "memory", "files", "docker", "script")
"""From the network up; each is a file of the table and a page of docs/errors."""
BROKEN, CAUSE, SEVERAL, CONSEQUENCE, REMARK = 4, 3, 2, 1, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownError:
    """One entry of the table."""

    id: str
    """Short name, and the anchor in docs/errors/LAYER.md."""
    layer: str
    rank: int
    """4 names the broken thing, 3 the cause, 2 several possible causes, 1 is a consequence, 0 a remark that healthy
    machines print too. The highest rank wins."""
    match: tuple[str, ...]
    """Texts, each an alternative; `...` stands for anything on the line, a blank for any white space, a leading `^` for
    the beginning of a line."""
    sample: str
    """One real text of the error."""
    cause: str
    fix: str
    source: str
    """Where the text comes from."""
    peer: bool = False
    """Printed by ranks whose peer has gone or never came, although it may have other causes too."""
    warning: bool = False
    """The text itself is a warning; others do not count where a line is only a warning or a retry."""

    @property
    def consequence(self) -> bool:
        """What another rank says of itself explains it."""
        return self.peer or self.rank == CONSEQUENCE


@cache
def all_errors() -> tuple[KnownError, ...]:
    """The whole table, in the order of the files."""
    return tuple(
        KnownError(**{**entry, "match": tuple(entry["match"]), "layer": layer})
        for layer in LAYERS
        for entry in _file(layer)["error"]
    )


def title(layer: str) -> str:
    return str(_file(layer)["title"])


@cache
def _file(layer: str) -> Mapping[str, Any]:
    return tomllib.loads((FOLDER / f"{layer}.toml").read_text(encoding="utf-8"))
