"""Bus bandwidth over size as an SVG: any browser shows it, and it needs no plotting library."""

from math import ceil, floor, log2, log10
from xml.sax.saxutils import escape

from app.bench.figures import Findings, Measure, readable_rate, readable_size

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 90, 660, 40, 420
"""The frame within the picture, in pixels; the names of the curves stand to its right."""
COLOURS = ("#1f5fbf", "#d03030", "#2a8a3e", "#b06a00", "#7a3fb0", "#202020")


def bandwidth_chart(findings: Findings) -> str:
    """An SVG of all measures, both axes logarithmic; the slowest known link is a dashed line.

    `findings` must have at least one measure.
    """
    links = [link.rate for link in findings.links if link.rate]
    rates = [measure.bus_bandwidth for measure in findings.measures] + links
    sizes = [measure.size for measure in findings.measures]
    low, high = floor(log10(min(rates))), ceil(log10(max(rates)))
    first, last = log2(min(sizes)), max(log2(max(sizes)), log2(min(sizes)) + 1)

    def x(size: float) -> float:
        return LEFT + (RIGHT - LEFT) * (log2(size) - first) / (last - first)

    def y(rate: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (log10(rate) - low) / max(1, high - low)

    parts = [
        _text(LEFT, 22, f"Bus bandwidth, {findings.backend}, {findings.ranks} ranks on {', '.join(findings.nodes)}")
    ]
    for power in range(low, high + 1):
        parts += [
            _line(LEFT, y(10**power), RIGHT, y(10**power), "#d8d8d8"),
            _text(8, y(10**power) + 4, _rate(10**power)),
        ]
    for size in sorted(set(sizes)):
        parts.append(_text(x(size) - 14, BOTTOM + 20, readable_size(size), small=True))
    if links:
        parts += [_line(LEFT, y(min(links)), RIGHT, y(min(links)), "#202020", dashed=True)]
        parts.append(_text(LEFT + 8, y(min(links)) - 6, f"link {readable_rate(min(links))}"))
    names = dict.fromkeys(measure.collective for measure in findings.measures)
    for row, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        curve = [measure for measure in findings.measures if measure.collective == name]
        points = " ".join(f"{x(one.size):.1f},{y(one.bus_bandwidth):.1f}" for one in curve)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        parts += [_line(RIGHT + 8, 60 + 22 * row, RIGHT + 28, 60 + 22 * row, colour)]
        parts.append(_text(RIGHT + 34, 64 + 22 * row, f"{name} {_best(curve)}"))
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">'
    return "\n".join([frame, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>\n"])


def _best(curve: list[Measure]) -> str:
    return readable_rate(max(measure.bus_bandwidth for measure in curve))


def _rate(rate: float) -> str:
    return f"{rate / 1e9:g} GB/s" if rate >= 1e9 else f"{rate / 1e6:g} MB/s"


def _text(x: float, y: float, words: str, *, small: bool = False) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{10 if small else 13}">{escape(words)}</text>'


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}" stroke-width="2"{dashes}/>'
    )
