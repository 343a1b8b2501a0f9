"""Nodes with a folder each on 127.0.0.x that exchange checkpoints, without any launcher or connection of the gang."""

import asyncio
import io
import json
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.gang.mirror.node import MirrorNode, Place
from app.gang.mirror.pages import Answering, ask_in_pages
from app.gang.mirror.plan import Bounds
from app.gang.mirror.session import Nodes, compare_only, level

NOW = 1_800_000_000
"""Seconds since the epoch that the tests count from: files are written at NOW + something."""


@dataclass
class Bed:
    root: Path
    count: int = 2
    said: list[str] = field(default_factory=list)
    asked: list[tuple[int, str]] = field(default_factory=list)
    answers: dict[tuple[int, str], Mapping[str, Any]] = field(default_factory=dict)
    clocks: dict[int, int] = field(default_factory=dict)
    """Nanoseconds by which a node's clock is ahead."""
    token: bytes = b""
    hook: Any = None
    """Called before each request as hook(rank, op)."""

    def folder(self, node: int) -> Path:
        return self.root / f"node{node}" / "checkpoints"

    def write(self, node: int, path: str, content: bytes | str, at: float = 0.0) -> Path:
        """A file as a script of `node` writes it, `at` seconds after NOW."""
        file = self.folder(node) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        os.utime(file, (NOW + at, NOW + at))
        return file

    def read(self, node: int) -> dict[str, bytes]:
        """All files of a node by path; links as `-> target`."""
        root = self.folder(node)
        found = {}
        for path in sorted(root.rglob("*")):
            if path.is_symlink():
                found[str(path.relative_to(root))] = f"-> {path.readlink()}".encode()
            elif path.is_file():
                found[str(path.relative_to(root))] = path.read_bytes()
        return found

    def names(self, node: int) -> set[str]:
        return set(self.read(node))

    def level(
        self, bounds: Bounds | None = None, *, background: bool = False, own: bool = False, last: bool = False
    ) -> list[str]:
        """One comparison; what was said in it."""
        self.said, self.asked, self.answers = [], [], {}
        asyncio.run(self._level(bounds or Bounds(), background=background, own=own, last=last))
        return self.said

    async def _level(self, bounds: Bounds, *, background: bool, own: bool, last: bool) -> None:
        each = [
            MirrorNode(
                Place(folder=self.folder(node), rank=node, address=f"127.0.0.{node + 1}", token=self.token),
                self.said.append,
            )
            for node in range(self.count)
        ]

        lines = [Answering(one.answer) for one in each]

        async def line(rank: int, told: Mapping[str, object]) -> Mapping[str, object]:
            return dict(json.loads(json.dumps(await lines[rank].hear(json.loads(json.dumps(told))))))

        async def ask(rank: int, op: str, told: Mapping[str, object]) -> Mapping[str, Any]:
            self.asked.append((rank, op))
            if self.hook:
                self.hook(rank, op)
            answer = await ask_in_pages(line, rank, op, told)
            if op == "mark" and "clock" in answer:
                answer["clock"] += self.clocks.get(rank, 0)
            self.answers[rank, op] = answer
            return answer

        nodes = Nodes(
            ranks=range(self.count),
            ask=ask,
            name=lambda rank: f"node {rank}",
            address=lambda rank: f"127.0.0.{rank + 1}",
            say=self.said.append,
        )
        if own:
            await compare_only(nodes)
        else:
            await level(nodes, bounds, second_copy=background or last, rate=10**9 if background else 0)

    def fetched(self, node: int) -> int:
        """How many files came to a node in the last comparison."""
        return int(self.answers.get((node, "fetch"), {}).get("arrived", 0))


def saved(text: str = "weights", pad: int = 0) -> bytes:
    """A checkpoint as torch.save writes it: a zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), text + "." * pad)
    return file.getvalue()


def tensors(values: bytes = b"abcd") -> bytes:
    """A safetensors file."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


def torn(content: bytes) -> bytes:
    """What a writer that was killed half-way leaves."""
    return content[: len(content) // 2]
