"""One variable as it was given: its text, what it means, and where it came from."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from app.config.errors import printable

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Value(Generic[T]):
    name: str
    text: str
    source: str
    """`.env:3`, `secrets/env:3`, `environment`, `compose.yaml`, `command line`, `default` or `detected`."""
    value: T
    secret: bool = False

    @property
    def shown(self) -> str:
        """The text as explain, reports and logs may have it."""
        return "(secret)" if self.secret else self.text

    def __str__(self) -> str:
        """`NODE_RANK=3 (.env:2)`: how every message names a value."""
        return f"{self.name}={printable(self.shown)} ({self.source})"


def plain(name: str, text: str, source: str) -> Value[str]:
    """A variable that means its own text."""
    return Value(name=name, text=text, source=source, value=text)
