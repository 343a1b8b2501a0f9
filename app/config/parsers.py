"""Texts of settings into what they mean, or a `Malformed` that says what is wrong and what to write."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Malformed(ValueError):  # noqa: N818 - a value is malformed; what to do about it is the reader's
    """A text that does not mean anything: the last part of a problem's id, and the values of its sentence."""

    def __init__(self, id: str, **values: object) -> None:
        super().__init__(id)
        self.id = id
        self.values: dict[str, Any] = values


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    span = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
            raise Malformed("not-a-number", span=span)
        value = int(text)
        if value < low or (high is not None and value > high):
            raise Malformed("out-of-range", span=span)
        return value

    return parse


def seconds(low: int) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,3})?", text):
            raise Malformed("not-seconds")
        if float(text) < low:
            raise Malformed("too-short", low=low)
        return float(text)

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise Malformed("unknown-word", words=words)
        return text

    return parse


def run_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise Malformed("not-a-folder-name")
    return text


def processes(text: str) -> int | str:
    """A number of at least 1, or `auto`, `gpu`, `cpu`."""
    if text in ("auto", "gpu", "cpu"):
        return text
    if not re.fullmatch(r"[0-9]{1,4}", text) or int(text) == 0:
        raise Malformed("not-processes")
    return int(text)


def shell_words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise Malformed("broken-quoting", why=str(error).rstrip(".").lower()) from None


def path(text: str) -> Path:
    if re.search(r"^~|\$", text):
        raise Malformed("not-expanded")
    return Path(text)


def modules(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if not all(re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) for name in names):
        raise Malformed("not-modules")
    return names


def entries(text: str) -> tuple[str, ...]:
    """The entries of NODES: commas, spaces or line ends between them, comments from # on."""
    without_comments = re.sub(r"#[^\n]*", "", text)
    return tuple(bare(entry) for entry in re.split(r"[,;\s]+", without_comments) if entry)


def bare(text: str) -> str:
    """`fd00::1` of `[fd00::1]`; anything else as it is."""
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def listener(text: str) -> tuple[str, int]:
    """`9400` for this machine's loopback, or an address and a port, `10.0.0.1:9400` or `[::]:9400`."""
    address, _, port = text.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise Malformed("not-a-listener")
    return bare(address) or "127.0.0.1", int(port)


def services(text: str) -> tuple[str, ...]:
    """Apprise's addresses. One may have commas of its own, but none before a scheme."""
    found = tuple(filter(None, re.split(r"[\s,;]+(?=[A-Za-z0-9]+://)", text)))
    if not all(re.match(r"[A-Za-z0-9]+://.", each) for each in found):
        raise Malformed("not-services")
    return found


def duration(text: str) -> float | None:
    """Seconds of a duration as Compose writes it, `1m30s`; None if it is none: Compose itself says so."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6}
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|us|h|m|s)", text)
    known = parts and "".join(number + unit for number, unit in parts) == text
    return sum(float(number) * units[unit] for number, unit in parts) if known else None


def number_or_all(text: str) -> int | None:
    """None for all."""
    if text == "all":
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise Malformed("not-a-number-or-all")
    return int(text)


def byte_count(text: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]{0,5})([KMGT])B", text)
    if not found:
        raise Malformed("not-a-size")
    return int(found[1]) * {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[found[2]]
