"""What a running launcher, its ranks and this machine do at this moment: `entrypoint.py status`."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.config.redaction import redact
from app.config.table import columns
from app.host.accelerators import read_loads
from app.host.accelerators.gpu import GpuLoad
from app.supervise.files import in_time
from app.supervise.health import read_states

READ_BYTES = 4096
"""Of the end of a rank's log."""
FILES = 2.0
"""Seconds that the file system of the logs has."""
GPUS = 5.0
"""Seconds that the driver has."""
Status = Mapping[str, Any]


def read_status() -> list[Status]:
    """All launchers of this user, each with the machine's GPUs and the last line that a rank of it printed. Never
    raises OSError."""
    states = read_states()
    loads = gpu_loads() if states else ()
    return [{**state, "gpus": [asdict(each) for each in loads], "last_words": last_words(state)} for state in states]


def gpu_loads() -> tuple[GpuLoad, ...]:
    """None where the driver does not answer soon."""
    try:
        return in_time(read_loads, GPUS)
    except OSError:
        return ()


def last_words(state: Status) -> str:
    """The last line of the log that was written last, without what looks like a secret; "" for none."""
    try:
        return redact(in_time(lambda: _last_line(Path(state["logs"])), FILES))[:200]
    except OSError:
        return ""


def _last_line(folder: Path) -> str:
    files = [(file.stat(), file) for file in folder.glob("*/attempt_0/*/std*.log")]
    written = [(status.st_mtime_ns, file) for status, file in files if status.st_size]
    if not written:
        return ""
    with max(written)[1].open("rb") as stream:
        stream.seek(-min(READ_BYTES, stream.seek(0, 2)), 2)
        lines = stream.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def to_text(found: Sequence[Status]) -> str:
    """For people, a paragraph for each launcher."""
    return "\n\n".join("\n".join(columns(rows(each))) for each in found) or "no launcher is running"


def rows(status: Status) -> list[tuple[str, str]]:
    """Name and value of what is known."""
    now, figures = time.time(), status["figures"]
    restarts = ", ".join(f"{count} ({cause})" for cause, count in status["restarts"].items())
    progress = f"{status['progress']}, {now - status['progress_time']:.0f} s ago" if status["progress"] else ""
    found = [
        ("run", f"{status['run']}: node {status['node']} of {status['nodes']}, {status['address']}"),
        ("state", f"{status['state']}, round {status['round']}" + (f", restarts: {restarts}" if restarts else "")),
        ("heartbeat", ", ".join(f"node {rank} {_trip(trip)}" for rank, trip in status["heartbeats"].items())),
        ("hang", status["hang"]),
        ("progress", progress),
        ("script", ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in figures.items())),
    ]
    found += [(f"gpu {gpu['index']}", _gpu(gpu)) for gpu in status["gpus"]]
    found += [
        (name, f"{got / 1e6:,.1f} MB/s in, {sent / 1e6:,.1f} MB/s out")
        for name, (got, sent) in status["bytes_per_second"].items()
    ]
    found += [(f"{now - at:.0f} s ago", text.partition("\n")[0]) for at, _, text in status["events"]]
    return [(name, value) for name, value in (*found, ("last words", status["last_words"])) if value]


def _trip(seconds: float | None) -> str:
    if seconds is None:
        return "not connected"
    return f"{seconds * 1000:.1f} ms" if seconds >= 0 else "not measured yet"


def _gpu(gpu: Mapping[str, Any]) -> str:
    busy, used, total, heat = (gpu[name] for name in ("busy", "used", "total", "temperature"))
    told = [
        "" if busy is None else f"{busy:.0%} busy",
        "" if used is None or total is None else f"{used / 1e9:.1f} of {total / 1e9:.1f} GB",
        "" if heat is None else f"{heat} C",
    ]
    return ", ".join(filter(None, told)) or "does not tell"


def to_json(found: Sequence[Status]) -> str:
    return json.dumps([dict(each) for each in found])
