"""Proves that the GPUs have the memory of the last round back before the next one starts.

A driver gives memory back a moment after its process has ended, and a round that starts meanwhile dies for want of it.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from app.supervise.files import off_loop

LIMIT = 5.0
"""Seconds. What is held for longer is another job's, or hangs in the driver: waiting would not help."""
ANSWER = 3.0
"""Seconds that a driver has for one answer."""
SLACK = 256
"""MiB by which the use of a GPU may differ without a process on it."""
SAY_AFTER = 0.5


async def until_free(
    before: Mapping[int, int],
    measure: Callable[[], Mapping[int, int]],
    say: Callable[[str], None],
    limit: float = LIMIT,
) -> None:
    """Returns once no GPU uses more than it did `before` the job, in MiB by index, or after `limit` seconds."""
    began = time.monotonic()
    while before:
        try:
            used = await off_loop(measure, ANSWER)
        except OSError:
            say("the driver does not say whether GPU memory is free again; the next round does not wait for it")
            return
        held = {gpu: used[gpu] - mib for gpu, mib in before.items() if used.get(gpu, 0) - mib > SLACK}
        seconds = time.monotonic() - began
        if not held:
            if seconds > SAY_AFTER:
                say(f"GPU memory of the last round was free again after {seconds:.1f} s")
            return
        if seconds >= limit:
            told = ", ".join(f"GPU {gpu} {mib:,} MiB" for gpu, mib in sorted(held.items()))
            why = "Another job may use them, or a process of the last round hangs in the driver: nvidia-smi shows which"
            say(
                f"warning: in use beyond what was before this job, {seconds:.0f} s after the last round: {told}. {why}."
            )
            return
        await asyncio.sleep(0.1)
