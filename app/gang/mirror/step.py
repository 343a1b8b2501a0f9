"""The exchange of checkpoints as a step of a job: between roll call and launch, and in the background of a round."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from app.gang.membership import Membership
from app.gang.mirror.node import MirrorNode, Place
from app.gang.mirror.pages import Answering, ask_in_pages
from app.gang.mirror.plan import Bounds
from app.gang.mirror.session import Nodes, compare_only, level
from app.plan import Plan

QUESTION = "checkpoints"
ANSWER = 12 * 3600.0
"""Seconds until a node that does not answer is given up: each has limits of its own, and some have much to fetch."""
EVERY = 10.0
"""Seconds between two looks for new checkpoints while a training runs."""
SHARE = 50
"""The looks take less than one part in so many of the time."""
SLOWEST, FASTEST, USUAL = 4_000_000, 250_000_000, 16_000_000
"""Bytes a second of a copy in the background; the last where the card does not tell its speed."""
Ask = Callable[[int, str, Mapping[str, object], float], Awaitable[Mapping[str, object] | None]]


async def share_checkpoints(plan: Plan, membership: Membership, ask: Ask, say: Callable[[str], None]) -> bool:
    """Brings all nodes level before a round, or says where they differ; whether any node got something."""
    nodes = _nodes(membership, ask, say)
    if plan.checkpoints.mirror:
        return await level(nodes, _bounds(plan))
    await compare_only(nodes)
    return False


async def copy_in_background(plan: Plan, membership: Membership, ask: Ask, say: Callable[[str], None]) -> None:
    """Gives what one node alone has a second copy, again and again, until it is cancelled or a node is lost."""
    with contextlib.suppress(OSError):
        pause, rate = EVERY, background_rate(plan.network.interface)
        while True:
            await asyncio.sleep(pause)
            started = time.monotonic()
            await level(_nodes(membership, ask, say), _bounds(plan), second_copy=True, rate=rate)
            pause = max(EVERY, SHARE * (time.monotonic() - started))


async def copy_last(plan: Plan, membership: Membership, ask: Ask, say: Callable[[str], None], seconds: float) -> None:
    """Gives what one node alone has a second copy when the training has ended. Never raises."""
    try:
        async with asyncio.timeout(seconds):
            await level(_nodes(membership, ask, say), _bounds(plan), second_copy=True)
    except TimeoutError:
        say(f"warning: checkpoints: {seconds:.0f} s (STOP_GRACE) were too short to copy the last ones to another node")
    except Exception as error:  # Whatever it is: the job has ended, and how is to be told.
        say(f"warning: checkpoints: the last ones were not copied to another node: {error}")


def background_rate(interface: str, root: Path = Path("/")) -> int:
    """Bytes a second: 2 % of what the card carries, so that a training which needs all of it loses no more."""
    try:
        megabits = int((root / "sys/class/net" / interface / "speed").read_text())
    except (OSError, ValueError):
        megabits = 0
    return min(FASTEST, max(SLOWEST, megabits * 125_000 // 50)) if megabits > 0 else USUAL


class Checkpoints:
    """One node's side: answers QUESTION."""

    def __init__(self, plan: Plan, token: bytes, say: Callable[[str], None]) -> None:
        network = plan.network
        place = Place(folder=plan.script.checkpoint_dir, rank=plan.nodes.rank, address=network.address, token=token)
        self._node = MirrorNode(place, say)
        self._answering = Answering(self._node.answer)

    async def answer(self, told: Mapping[str, object]) -> dict[str, object]:
        """Raises ValueError for a question that makes no sense."""
        return await self._answering.hear(told)

    def stop(self) -> None:
        self._node.stop()


def _bounds(plan: Plan) -> Bounds:
    return Bounds(keep=plan.checkpoints.keep, limit=plan.checkpoints.limit)


def _nodes(membership: Membership, ask: Ask, say: Callable[[str], None]) -> Nodes:
    here = membership.all()

    async def line(rank: int, told: Mapping[str, object]) -> Mapping[str, object] | None:
        return await ask(rank, QUESTION, told, ANSWER)

    return Nodes(
        ranks=[*here],
        ask=lambda rank, op, told: ask_in_pages(line, rank, op, told),
        name=membership.name,
        address=lambda rank: membership.address(here[rank].hello),
        say=say,
    )
