"""Facts of any size between node 0 and a node, whose questions and answers are short lines: compressed, in pages."""

import base64
import json
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from app.gang.mirror.manifest import fields

PAGE = 32_000
"""Bytes; with base64 well below the longest line."""
MOST_PAGES = 2_000
LARGEST = 1 << 27
"""Bytes once unpacked: 200,000 entries of long names."""
Ask = Callable[[int, Mapping[str, object]], Awaitable[Mapping[str, object] | None]]
"""Asks one node in one line: (rank, with what). None if it is lost."""
Act = Callable[[str, dict[str, Any]], Awaitable[Mapping[str, object]]]
"""Does what a whole question says: (what, with what)."""


def pages(told: Mapping[str, object]) -> Iterator[str]:
    packed = zlib.compress(json.dumps(told, separators=(",", ":")).encode(), 1)
    for start in range(0, len(packed), PAGE):
        yield base64.b64encode(packed[start : start + PAGE]).decode()


class Unpacker:
    """Puts pages together."""

    def __init__(self) -> None:
        self._found = list[bytes]()

    def add(self, page: object) -> None:
        """Raises ValueError."""
        if not isinstance(page, str) or len(self._found) >= MOST_PAGES:
            raise ValueError("too many pages")
        self._found.append(base64.b64decode(page, validate=True))

    def take(self) -> dict[str, Any]:
        """All of it. Raises ValueError."""
        unpacker = zlib.decompressobj()
        try:
            told = unpacker.decompress(b"".join(self._found), LARGEST)
        except zlib.error as error:
            raise ValueError("not what was packed") from error
        if unpacker.unconsumed_tail:
            raise ValueError(f"more than {LARGEST} bytes")
        return fields(json.loads(told))


async def ask_in_pages(ask: Ask, rank: int, op: str, told: Mapping[str, object]) -> dict[str, Any]:
    """The whole answer of one node. Raises OSError if it is lost, ValueError if it makes no sense."""
    *before, last = pages(told)
    for index, page in enumerate(before):
        await _one(ask, rank, {"page": page, "begin": not index})
    reply = await _one(ask, rank, {"page": last, "begin": not before, "op": op})
    found = Unpacker()
    found.add(reply.get("page"))
    while reply.get("more") is True:
        reply = await _one(ask, rank, {"more": True})
        found.add(reply.get("page"))
    return found.take()


async def _one(ask: Ask, rank: int, told: Mapping[str, object]) -> Mapping[str, object]:
    reply = await ask(rank, told)
    if reply is None:
        raise ConnectionResetError(f"node {rank} was lost")
    return reply


class Answering:
    """The other end of `ask_in_pages`."""

    def __init__(self, act: Act) -> None:
        self._act = act
        self._question = Unpacker()
        self._answer: list[str] = []

    async def hear(self, told: Mapping[str, object]) -> dict[str, object]:
        """One line of a question; one line of the answer. Raises ValueError."""
        if told.get("more") is not True:
            if told.get("begin") is True:
                self._question = Unpacker()
            self._question.add(told.get("page"))
            op = told.get("op")
            if not isinstance(op, str):
                return {}
            question, self._question = self._question, Unpacker()
            answer = await self._act(op, question.take())
            self._answer = [*pages(answer)][::-1]
        if not self._answer:
            raise ValueError("there is no more")
        page = self._answer.pop()
        return {"page": page, "more": bool(self._answer)}
