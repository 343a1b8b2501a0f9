"""The launcher's own lines on the terminal."""

import contextlib
import os
import sys
from typing import TextIO


def say(text: str) -> None:
    """Prints on stderr without secrets, each line with the program's name: compose adds only the service's."""
    # `healthcheck`, which compose starts every 30 s, has nothing to say.
    from app.config.redaction import redact

    show("".join(f"torchrun-compose: {line}\n" for line in redact(text).splitlines()), sys.stderr)


def show(text: str, stream: TextIO) -> None:
    """A terminal or a disk that is gone must not end a training."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(text)
        stream.flush()


def open_streams() -> None:
    """Gives a process that was started without stdin, stdout or stderr an empty one: the next file or pipe that is
    opened would be taken for it."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            # Always the lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def close_streams() -> None:
    """Without this Python ends with 120, whatever the exit code was, where the last lines cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
