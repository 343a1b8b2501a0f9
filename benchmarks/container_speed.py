"""Training speed inside the container against the same training outside: `python -m benchmarks.container_speed`.

Needs root: it runs the real image and compose file on an engine of the testbed. Runs alternate, and each pair gives one
ratio, since the speed of a shared machine drifts.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.testbed import Node, cluster

PROJECT = Path(__file__).resolve().parent.parent
PAIRS = 5
SETTINGS = {"NPROC_PER_NODE": "2", "TRAIN_ARGS": "--steps=120 --log-every=10 --eval-every=0", "RUN_NAME": "speed"}


def main() -> int:
    ratios = []
    with cluster(nodes=1) as bed, tempfile.TemporaryDirectory() as folder:
        for pair in range(PAIRS):
            contained = speed(in_container(bed.nodes[0]))
            native = speed(natively(Path(folder) / str(pair)))
            ratios.append(contained / native)
            print(f"container {contained:,.0f} tokens/s, native {native:,.0f}: {ratios[-1]:.3f}", flush=True)
    print(f"container / native, median of {PAIRS} pairs: {statistics.median(ratios):.3f}")
    return 0


def in_container(node: Node) -> str:
    node.clear()
    stack = node.up(SETTINGS)
    if stack.wait(300) != 0:
        raise SystemExit(stack.logs())
    return stack.logs()


def natively(runs: Path) -> str:
    environment = {**os.environ, **SETTINGS, "RUNS_ROOT": str(runs), "ENV_FILE": os.devnull}
    command = [sys.executable, str(PROJECT / "entrypoint.py")]
    return subprocess.run(
        command, cwd=PROJECT, env=environment, check=True, timeout=300, stdout=subprocess.PIPE, text=True
    ).stdout


def speed(output: str) -> float:
    """Median tokens/s of the lines after the first, which carries the warm-up."""
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) tokens/s", output)]
    return statistics.median(rates[1:])


if __name__ == "__main__":
    sys.exit(main())
