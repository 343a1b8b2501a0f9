"""The table for people, and the files: the figures as JSON, their picture, the baseline of this cluster."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.bench.figures import Findings, SlowPart, readable_rate, readable_size
from app.bench.verdict import changes, is_good, key_figures, node_name, of_link, slow_parts, spread
from app.config.table import columns

SCHEMA = 1


def render(findings: Findings) -> str:
    """The figures and the verdict, as printed by rank 0."""
    return "\n".join([*_head(findings), "", *_table(findings), "", *_verdict(findings)])


def publish(findings: Findings, folder: Path) -> None:
    """Prints the figures first: nothing that goes wrong with the files may take them along."""
    print(render(findings), flush=True)
    try:
        print(*keep(findings, folder), sep="\n", flush=True)
    except (OSError, ValueError, KeyError) as error:
        # ValueError, KeyError: a baseline that was edited.
        print(f"The figures above are not kept, or not compared with a baseline, in {folder}: {error}", flush=True)


def keep(findings: Findings, folder: Path) -> tuple[str, ...]:
    """Writes the figures into `folder`, compares them with the baseline, and returns what to say about both.

    The first good result of a cluster becomes its baseline, and stays it until the file is deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result, baseline = folder / "result.json", folder / f"baseline-{_cluster(findings)}.json"
    write(result, json.dumps(as_json(findings), indent=1) + "\n")
    figures = f"Figures: {result}{_draw(findings, folder)}"
    if baseline.exists():
        before = json.loads(baseline.read_text(encoding="utf-8"))
        changed = changes(findings, before["figures"]) or ("no figure differs by more than a quarter",)
        return (f"Against the baseline {baseline}:", *(f"  {line}" for line in changed), figures)
    if is_good(findings):
        write(baseline, json.dumps({"schema": SCHEMA, "figures": key_figures(findings)}, indent=1) + "\n")
        return (f"Kept as the baseline for later runs: {baseline}", figures)
    return (f"{figures} (not kept as a baseline, since something is wrong)",)


def _draw(findings: Findings, folder: Path) -> str:
    """The end of the line that names the files."""
    if not findings.measures:
        return ""
    try:
        # Only rank 0 draws, once, at the end: the other ranks never load Pillow.
        from app.bench.chart import bandwidth_chart
    except ImportError as error:
        return f"; no bandwidth.png ({error})"
    write(folder / "bandwidth.png", bandwidth_chart(findings))
    return ", bandwidth.png"


def as_json(findings: Findings) -> dict[str, Any]:
    """Everything that was found: sizes in bytes, times in seconds, bandwidths in bytes per second."""
    measures = [
        {**asdict(measure), "algorithm_bandwidth": measure.algorithm_bandwidth, "bus_bandwidth": measure.bus_bandwidth}
        for measure in findings.measures
    ]
    slow = [
        {**asdict(part), "severe": part.severe, "sentence": sentence(part, findings)} for part in slow_parts(findings)
    ]
    return {"schema": SCHEMA, **asdict(findings), "measures": measures, "slow": slow, "good": is_good(findings)}


def sentence(part: SlowPart, findings: Findings) -> str:
    """A slow part, for people."""
    names = [node_name(findings.nodes, node) for node in part.nodes]
    rate, expected = readable_rate(part.bandwidth), readable_rate(part.expected)
    if part.id == "slow-node":
        return (
            f"{names[0]} {part.way} slowly: {rate} with every other node, while others reach {expected}. Check its "
            "cable, switch port, duplex and errors (`ethtool NIC`, `ip -s link`), and what else uses its network."
        )
    if part.id == "slow-path":
        return (
            f"From {names[0]} to {names[1]}: {rate}, while others reach {expected}. Check the cable, port and duplex "
            "on this path (`ethtool NIC`)."
        )
    below = f"{names[0]} to {names[1]}: {rate}, {100 * part.bandwidth / part.expected:.0f} % of the link's {expected}"
    if part.id == "below-link":
        return f"From {below}. Check the cable, port and duplex on this path (`ethtool NIC`)."
    return (
        f"{part.paths} of {len(findings.pairs)} paths stay far below what their links promise, the slowest from "
        f"{below}. Check which interface and switch they go through (`explain`, `ethtool NIC`)."
    )


def _cluster(findings: Findings) -> str:
    device = re.sub(r"\W+", "-", findings.device)
    return f"{len(findings.nodes)}x{findings.ranks}-{findings.backend}-{device}"


def write(path: Path, content: str | bytes) -> None:
    # Whole or not at all: a reader never sees half a file.
    partial = path.with_suffix(".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def _head(findings: Findings) -> Iterator[str]:
    nodes = f"{len(findings.nodes)} node{'s' if len(findings.nodes) > 1 else ''}"
    yield f"bench: {findings.ranks} ranks on {nodes}, {findings.backend} on {findings.device}"
    for node, link in enumerate(findings.links):
        rate = readable_rate(link.rate) if link.rate else "rate unknown"
        yield f"  {node_name(findings.nodes, node)}: {link.name or 'interface unknown'}, {rate}"
    rows = []
    for pair in findings.pairs:
        share = of_link(pair.bandwidth, findings, (pair.source, pair.target))
        rows.append(
            [
                f"  node {pair.source} to node {pair.target}:",
                readable_rate(pair.bandwidth),
                f"{share:.0%} of the link" if share else "",
                f"latency {pair.latency * 1e6:.0f} us",
            ]
        )
    yield from columns(rows, right={1})


def _table(findings: Findings) -> Iterator[str]:
    rows = [["collective", "size", "time us", "algbw GB/s", "busbw GB/s", "of link", "result"]]
    for measure in findings.measures:
        share = of_link(measure.bus_bandwidth, findings)
        rows.append(
            [
                measure.collective,
                readable_size(measure.size),
                f"{measure.seconds * 1e6:.1f}",
                f"{measure.algorithm_bandwidth / 1e9:.3f}",
                f"{measure.bus_bandwidth / 1e9:.3f}",
                f"{share:.0%}" if share else "-",
                "right" if measure.correct else "WRONG",
            ]
        )
    rows += [[name, f"not supported by {findings.backend}"] for name in findings.unsupported]
    yield from columns(rows, right={1, 2, 3, 4, 5})
    if findings.cut_short:
        yield f"Larger sizes left out for want of time or memory: {', '.join(findings.cut_short)} (raise --seconds)."


def _verdict(findings: Findings) -> Iterator[str]:
    wrong = sorted({measure.collective for measure in findings.measures if not measure.correct})
    if wrong:
        yield f"WRONG RESULTS: {', '.join(wrong)}. Do not train on this cluster; test memory and GPUs of each node."
    slow = slow_parts(findings)
    yield from (f"SLOW: {sentence(part, findings)}" for part in slow)
    if findings.pairs and not slow:
        yield f"No node or path is slower than the others: {spread(findings.pairs)}."
    if not findings.pairs:
        yield "One node: nothing was sent over the network."
