"""The loss as a PNG, drawn with the standard library: the image carries no plotting library for one picture a run."""

import struct
import zlib
from collections.abc import Mapping

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 60, 700, 20, 360
"""The frame within the picture, in pixels."""
PALETTE = bytes.fromhex("ffffffd8d8d81f5fbfd03030202020")
WHITE, GRID, TRAINING, HELD_OUT, INK = range(5)
GLYPHS = ["75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717", "00002"]
FONT = dict(zip("0123456789.", GLYPHS, strict=True))
"""Rows of three pixels, one octal digit each."""


def loss_picture(losses: Mapping[int, float], held_out: Mapping[int, float]) -> bytes:
    """A PNG of loss in nats per token over steps: a line for training, dots for held-out text.

    Both are mappings from step to loss; `losses` must not be empty.
    """
    values = [*losses.values(), *held_out.values()]
    low, high = min(values), max(values)
    high = max(high, low + 1e-6)
    first, last = min(losses), max(*losses, min(losses) + 1)
    canvas = [bytearray(WIDTH) for _ in range(HEIGHT)]

    def place(step: int, loss: float) -> tuple[int, int]:
        x = LEFT + (RIGHT - LEFT) * (step - first) // (last - first)
        return x, BOTTOM - round((BOTTOM - TOP) * (loss - low) / (high - low))

    for part in range(5):
        loss, step = low + (high - low) * part / 4, first + (last - first) * part // 4
        x, y = place(step, loss)
        canvas[y][LEFT:RIGHT] = bytes([GRID]) * (RIGHT - LEFT)
        _write(canvas, LEFT - 48, y - 5, f"{loss:.2f}")
        _write(canvas, min(x, RIGHT - 24), BOTTOM + 12, str(step))
    points = [place(step, losses[step]) for step in sorted(losses)]
    for begin, end in zip(points, points[1:] or points, strict=False):
        _line(canvas, begin, end)
    for step, loss in held_out.items():
        _dot(canvas, *place(step, loss))
    return _png(canvas)


def _write(canvas: list[bytearray], x: int, y: int, text: str) -> None:
    for character in text:
        for row, bits in enumerate(FONT[character]):
            for column in range(3):
                if int(bits, 8) >> (2 - column) & 1:
                    for line in (y + 2 * row, y + 2 * row + 1):
                        canvas[line][x + 2 * column : x + 2 * column + 2] = bytes([INK, INK])
        x += 8


def _line(canvas: list[bytearray], begin: tuple[int, int], end: tuple[int, int]) -> None:
    (x0, y0), (x1, y1) = begin, end
    count = max(abs(x1 - x0), abs(y1 - y0), 1)
    for part in range(count + 1):
        canvas[y0 + (y1 - y0) * part // count][x0 + (x1 - x0) * part // count] = TRAINING


def _dot(canvas: list[bytearray], x: int, y: int) -> None:
    for row in range(max(0, y - 3), y + 4):
        canvas[row][x - 3 : x + 4] = bytes([HELD_OUT]) * 7


def _png(canvas: list[bytearray]) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 3, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in canvas))
    chunks = chunk(b"IHDR", header) + chunk(b"PLTE", PALETTE) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
