"""Facts of any size over a connection whose messages are short lines: compressed, and cut into pages."""

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from app.gang.mirror.manifest import fields

PAGE = 32_000
"""Bytes; with base64 well below the longest line."""
MOST_PAGES = 2_000
LARGEST = 1 << 27
"""Bytes once unpacked: 200,000 entries of long names."""


def pages(told: Mapping[str, object]) -> Iterator[str]:
    packed = zlib.compress(json.dumps(told, separators=(",", ":")).encode(), 1)
    for start in range(0, len(packed), PAGE):
        yield base64.b64encode(packed[start : start + PAGE]).decode()


class Unpacker:
    """Puts the pages of one answer together."""

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
