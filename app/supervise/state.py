"""What this node knows of its job: for `healthcheck` and `status` in a small file, for Prometheus in the launcher.

The file lies in the launcher's own folder (runtime_dir.py) and is written again every few seconds.
"""

import asyncio
import contextlib
import functools
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path

from app.gang.messages import JobEvent
from app.plan import Plan
from app.supervise.files import off_loop
from app.supervise.progress import Gained
from app.supervise.traffic import count_bytes

STATE = "state.json"
WRITE_EVERY = 2.0
KEPT = 5
"""Of the newest events."""
Trips = Callable[[], Mapping[int, float | None]]
"""Seconds of a heartbeat's round trip, by node: on node 0 of all nodes, elsewhere of node 0. None for a node that is
not connected, negative where nothing was measured yet."""


class NodeState:
    """This launcher's state and its file."""

    def __init__(
        self, plan: Plan, folder: Path, progress: Callable[[], Gained], trips: Trips, ranks: Callable[[], range]
    ) -> None:
        self.record: Mapping[str, object] = {}
        """The newest, replaced as a whole: other threads read it."""
        self._plan, self._folder, self._progress, self._trips, self._ranks = plan, folder, progress, trips, ranks
        self._state, self._round, self._started = "waiting", 0, time.time()
        self._restarts, self._hang = Counter[str](), ""
        self._events: deque[tuple[float, str, str]] = deque(maxlen=KEPT)
        self._counted, self._rates = (time.monotonic(), count_bytes(plan.network.interface)), dict[str, list[float]]()
        self._changed = asyncio.Event()

    def change(self, state: str, round_: int) -> None:
        self._state, self._round = state, round_
        self._changed.set()

    def take(self, event: JobEvent) -> None:
        """What happens to the job."""
        if event.kind == "restarting":
            self._restarts[event.cause] += 1
        self._hang = event.text if event.kind == "hang" else ""
        if event.text:
            self._events.append((time.time(), event.kind, event.text))
        self._changed.set()

    async def keep(self) -> None:
        """Writes the file while the event loop runs."""
        while True:
            self._changed.clear()
            write = functools.partial(self._write, self._known())
            # A full disk must not end a training.
            with contextlib.suppress(OSError):
                await off_loop(write, WRITE_EVERY)
            # Python 3.11's wait_for swallows a cancel that comes as the awaited ends.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WRITE_EVERY):
                    await self._changed.wait()

    def _known(self) -> dict[str, object]:
        plan, progress, ranks = self._plan, self._progress(), self._ranks()
        return {
            "run": plan.run_name,
            "node": plan.nodes.rank,
            "nodes": plan.nodes.count,
            "address": plan.network.address,
            "state": self._state,
            "round": self._round,
            "ranks": [*ranks],
            "restarts": dict(self._restarts),
            "hang": self._hang,
            "events": [*self._events],
            "heartbeats": {str(rank): trip for rank, trip in self._trips().items()},
            "progress": progress.text,
            "progress_time": progress.time,
            "figures": dict(progress.figures),
            "logs": str(plan.log_dir),
            "started": self._started,
            "time": time.time(),
        }

    def _write(self, known: Mapping[str, object]) -> None:
        now, counted = time.monotonic(), count_bytes(self._plan.network.interface)
        (then, before) = self._counted
        seconds = now - then
        # A change of state comes right after the last sample: too short a time for a rate.
        if seconds >= WRITE_EVERY / 2:
            self._counted = (now, counted)
            self._rates = {
                name: [max(0, new - old) / seconds for new, old in zip(counts, before[name], strict=True)]
                for name, counts in counted.items()
                if name in before
            }
        self.record = {**known, "bytes": counted, "bytes_per_second": self._rates}
        new = self._folder / f"{STATE}.new"
        new.write_text(json.dumps(self.record))
        new.replace(self._folder / STATE)
