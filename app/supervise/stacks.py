"""What every rank of this node does at this moment, any script: `entrypoint.py stacks`. Nothing is stopped for it.

The watchdog's thread in each rank (engine/watchdog.py) is asked through a named pipe in the launcher's own folder.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.supervise.health import read_states

ANSWER = 5.0
"""Seconds that a rank has: its watchdog's thread needs the GIL once."""
NO_ANSWER = "does not answer: native code holds the GIL, or it is no Python script"
NOT_RUNNING = "does not run"
Stacks = Mapping[str, Any]


def read_stacks(states: Sequence[Mapping[str, Any]] | None = None) -> list[Stacks]:
    """All ranks of all launchers of this user: `rank`, `run`, `node`; with `pid`, `at`, `entered` and `threads` of one
    that answered, `why` of one that did not. Never raises OSError."""
    found = list[Stacks]()
    for state in read_states() if states is None else states:
        where = {"run": state["run"], "node": state["node"]}
        found += [{**where, **each} for each in _ask(Path(state["folder"]), state["ranks"])]
    return found


def _ask(folder: Path, ranks: Sequence[int]) -> list[Stacks]:
    began = time.time()
    answers: dict[int, Stacks] = {rank: {"why": NOT_RUNNING} for rank in ranks if not _request(folder, rank)}
    while len(answers) < len(ranks) and time.time() < began + ANSWER:
        time.sleep(0.02)
        for rank in ranks:
            with contextlib.suppress(OSError, ValueError):
                content = json.loads((folder / f"rank{rank}.stacks").read_text(encoding="utf-8"))
                # An older one answers an older question.
                if content["time"] >= began:
                    answers[rank] = content
    return [{"rank": rank, **answers.get(rank, {"why": NO_ANSWER})} for rank in ranks]


def _request(folder: Path, rank: int) -> bool:
    """Whether somebody is there to answer."""
    try:
        descriptor = os.open(folder / f"rank{rank}.ask", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(descriptor, b"?")
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return True


def to_text(found: Sequence[Stacks]) -> str:
    """Ranks with the same stacks together."""
    groups: dict[str, list[int]] = {}
    for each in found:
        groups.setdefault(told(each), []).append(each["rank"])
    parts = [
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} {text}" for text, ranks in groups.items()
    ]
    return "\n\n".join(parts) or "no launcher is running"


def told(stacks: Stacks) -> str:
    """What one rank does, with its stacks."""
    if "why" in stacks:
        return str(stacks["why"])
    last = stacks["entered"][-1] if stacks["entered"] else None
    entered = f"; {'after' if last['done'] else 'in'} {last['name']} #{last['sequence']}" if last else ""
    threads = "".join(f"\n  thread {each['name']}:\n{_indented(each['stack'])}" for each in stacks["threads"])
    return f"at {stacks['at']}{entered}{threads}"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


def to_json(found: Sequence[Stacks]) -> str:
    """With `text` as people read it."""
    return json.dumps([{**each, "text": told(each)} for each in found])
