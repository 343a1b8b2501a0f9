"""Bus bandwidth over size as a PNG. Pillow draws it: the image has it for TensorBoard already."""

import io
from math import ceil, floor, log2, log10

from PIL import Image, ImageDraw, ImageFont

from app.bench.figures import Findings, Measure, readable_rate, readable_size

SIZE = (1000, 520)
LEFT, RIGHT, TOP, BOTTOM = 100, 740, 50, 460
"""The frame within the picture, in pixels; the names of the curves stand to its right."""
COLOURS = ("#1f5fbf", "#d03030", "#2a8a3e", "#b06a00", "#7a3fb0", "#008b8b")
INK, GRID, LINK = "#202020", "#d8d8d8", "#c800c8"


def bandwidth_chart(findings: Findings) -> bytes:
    """A PNG of all measures, both axes logarithmic; the slowest known link is a line of its own.

    `findings` must have at least one measure.
    """
    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    links = [link.rate for link in findings.links if link.rate]
    rates = [measure.bus_bandwidth for measure in findings.measures] + links
    sizes = sorted({measure.size for measure in findings.measures})
    low, high = floor(log10(min(rates))), ceil(log10(max(rates)))
    first, last = log2(sizes[0]), max(log2(sizes[-1]), log2(sizes[0]) + 1)

    def x(size: float) -> float:
        return LEFT + (RIGHT - LEFT) * (log2(size) - first) / (last - first)

    def y(rate: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (log10(rate) - low) / max(1, high - low)

    title = f"Bus bandwidth, {findings.backend}, {findings.ranks} ranks on {', '.join(findings.nodes)}"
    draw.text((LEFT, 16), title, INK, font)
    for rate in (10**power for power in range(low, high + 1)):
        draw.line([(LEFT, y(rate)), (RIGHT, y(rate))], GRID)
        draw.text((LEFT - 8, y(rate)), _rate(rate), INK, font, anchor="rm")
    for size in sizes:
        draw.text(
            (x(size), BOTTOM + 10), readable_size(size).replace(" ", "\n"), INK, small, anchor="ma", align="center"
        )
    if links:
        draw.line([(LEFT, y(min(links))), (RIGHT, y(min(links)))], LINK, width=2)
        draw.text((LEFT + 8, y(min(links)) - 4), f"link {readable_rate(min(links))}", LINK, font, anchor="ls")
    names = dict.fromkeys(measure.collective for measure in findings.measures)
    for row, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        curve = [measure for measure in findings.measures if measure.collective == name]
        draw.line([(x(one.size), y(one.bus_bandwidth)) for one in curve], colour, width=3, joint="curve")
        draw.text((RIGHT + 12, 60 + 26 * row), f"{name} {_best(curve)}", colour, font)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _best(curve: list[Measure]) -> str:
    return readable_rate(max(measure.bus_bandwidth for measure in curve))


def _rate(rate: float) -> str:
    return f"{rate / 1e9:g} GB/s" if rate >= 1e9 else f"{rate / 1e6:g} MB/s"
