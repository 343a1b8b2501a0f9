"""Memory of eight ranks that have imported torch and made no tensor yet: `python -m benchmarks.rank_memory [PAIRS]`.

PSS (memory that several processes share is divided among them) of the first process and all below it, torchrun and the
preloaded process included; plain torchrun and ours in turn. Linux only.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from benchmarks.pairs import environ, ours, settings, tell, torchrun

PAIRS, RANKS, DEADLINE = 3, 8, 300.0
SCRIPT = """
import os, sys, time, torch
open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").close()
time.sleep(3600)
"""


def main() -> int:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS
    sizes: dict[str, list[float]] = {"torchrun": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "waits.py"
        script.write_text(SCRIPT)
        for pair in range(pairs):
            for what, values in sizes.items():
                here = folder / f"{what}{pair}"
                here.mkdir()
                words = (str(script), str(here))
                if what == "torchrun":
                    values.append(measure(torchrun(*words, nproc=RANKS), environ(), here))
                else:
                    values.append(measure(ours(*words), settings(folder / "runs", RANKS), here))
    tell(sizes, "torchrun", "MiB", 0)
    return 0


def measure(command: list[str], env: Mapping[str, str], here: Path) -> float:
    """MiB once all ranks are here."""
    job = psutil.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + DEADLINE
        while len([*here.iterdir()]) < RANKS:
            if job.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{command} has not started {RANKS} ranks")
            time.sleep(0.1)
        return float(sum(each.memory_full_info().pss for each in [job, *job.children(recursive=True)])) / (1 << 20)
    finally:
        job.terminate()
        job.wait(60)


if __name__ == "__main__":
    sys.exit(main())
