"""Host names to addresses, side by side and with a deadline: a dead name server must not look like a hang."""

import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.host.addresses import canonical
from app.host.files import text

DEADLINE = 15.0
"""Seconds. The C library's resolver tries each of three servers twice for 5 s; two of them must have had their turn."""
SILENCE = 2.0
MADE_UP = "names.json"
"""In a made-up root: {"name": ["address", ...]}; a name that is absent has no address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the name resolution of this machine says to one name."""

    addresses: tuple[str, ...] = ()
    """IPv4 first, each once."""
    failure: str = ""


def resolve_names(names: Sequence[str], root: Path = Path("/")) -> dict[str, Answer]:
    """Looks up all names at once; takes at most DEADLINE seconds and says after SILENCE seconds what it waits for."""
    if root != Path("/"):
        import json

        known = json.loads(text(root / MADE_UP) or "{}")
        return {name: _made_up(known.get(name, [])) for name in names}
    answers: dict[str, Answer] = {}
    threads = {name: threading.Thread(target=_lookup, args=(name, answers), daemon=True) for name in set(names)}
    start = time.monotonic()
    for thread in threads.values():
        thread.start()
    _join(threads, start + SILENCE)
    late = sorted(name for name, thread in threads.items() if thread.is_alive())
    if late:
        print(f"waiting for the address of {', '.join(late)}, {DEADLINE:.0f} s at most", file=sys.stderr, flush=True)
        _join(threads, start + DEADLINE)
    silent = Answer(failure=f"no answer from the name server within {DEADLINE:.0f} s")
    return {name: answers.get(name, silent) for name in names}


def _join(threads: dict[str, threading.Thread], until: float) -> None:
    for thread in threads.values():
        thread.join(max(0.0, until - time.monotonic()))


def _lookup(name: str, answers: dict[str, Answer]) -> None:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        answers[name] = Answer(failure=error.strerror or str(error) if isinstance(error, OSError) else "no host name")
        return
    addresses = dict.fromkeys(canonical(str(entry[4][0])) for entry in sorted(found, key=lambda entry: entry[0]))
    answers[name] = Answer(addresses=tuple(addresses))


def _made_up(addresses: list[str]) -> Answer:
    if not addresses:
        return Answer(failure="Name or service not known")
    return Answer(addresses=tuple(addresses))
