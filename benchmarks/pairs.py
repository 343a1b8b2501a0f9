"""What benchmarks of starts share: plain torchrun and ours as commands, medians, and the machine's load beside them."""

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PORT = 29400


def torchrun(*script: str, node: int = 0, nodes: int = 1, nproc: int = 2) -> list[str]:
    flags = [f"--nnodes={nodes}", f"--nproc-per-node={nproc}", f"--node-rank={node}"]
    flags += ["--master-addr=127.0.0.1", f"--master-port={PORT}"]
    return [sys.executable, "-m", "torch.distributed.run", *flags, *script]


def ours(*script: str) -> list[str]:
    return [sys.executable, str(PROJECT / "entrypoint.py"), "run", *script]


def settings(folder: Path, nproc: int = 2, **more: str) -> dict[str, str]:
    """The environment of a launcher that keeps its runs in `folder`."""
    own = {"RUNS_ROOT": str(folder), "NPROC_PER_NODE": str(nproc), "MASTER_PORT": str(PORT), "ENV_FILE": os.devnull}
    return {**environ(), **own, **more}


def environ() -> dict[str, str]:
    """The same for plain torchrun."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def tell(measured: Mapping[str, Sequence[float]], base: str, unit: str = "s", precision: int = 2) -> None:
    """Prints each row with its ratio to `base`, pair by pair."""
    width = max(len(what) for what in measured)
    for what, values in measured.items():
        median, low, high = (f"{each:,.{precision}f}" for each in (statistics.median(values), min(values), max(values)))
        ratios = [one / other for one, other in zip(values, measured[base], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{what:{width}}  median {median} {unit} ({low} to {high})  / {base} {spread}")
    loads = " ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, load {loads}, {os.cpu_count()} cores", flush=True)
