"""The launcher's own lines on the terminal."""

import sys


def say(text: str) -> None:
    """Prints on stderr, each line with the program's name: compose adds only the service's."""
    sys.stderr.write("".join(f"torchrun-compose: {line}\n" for line in text.splitlines()))
    sys.stderr.flush()
