"""What our entrypoint adds to plain torchrun: `python -m benchmarks.launch_overhead`.

The same script, one node, two processes, started in turn by `python entrypoint.py` and by `torchrun`; the entrypoint's
own CPU time (its children left out) is what a user pays on top. Linux only.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
PAIRS = 7
PORT = 29400
SCRIPT = "import os\n"


class Cost(NamedTuple):
    """Seconds of one run: CPU of the first process alone, CPU of it and all its descendants, wall clock."""

    own: float
    tree: float
    wall: float


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "nothing.py"
        script.write_text(SCRIPT)
        ours, plain = [], []
        for pair in range(PAIRS + 1):
            costs = (entrypoint(script, folder), torchrun(script))
            if pair:
                ours.append(costs[0])
                plain.append(costs[1])
    own = sorted(1000 * cost.own for cost in ours)
    print(
        f"entrypoint's own CPU: median {statistics.median(own):.0f} ms, {own[0]:.0f} to {own[-1]:.0f} in {PAIRS} runs"
    )
    print("entrypoint / torchrun, pair by pair:")
    print(f"  CPU of the whole start  {ratios([cost.tree for cost in ours], [cost.tree for cost in plain])}")
    print(f"  wall clock              {ratios([cost.wall for cost in ours], [cost.wall for cost in plain])}")
    return 0


def ratios(ours: list[float], plain: list[float]) -> str:
    pairs = sorted(a / b for a, b in zip(ours, plain, strict=True))
    return f"median {statistics.median(pairs):.3f} ({pairs[0]:.3f} to {pairs[-1]:.3f})"


def entrypoint(script: Path, folder: str) -> Cost:
    environment = {
        **os.environ,
        "RUNS_ROOT": folder,
        "NPROC_PER_NODE": "2",
        "MASTER_PORT": str(PORT),
        "ENV_FILE": os.devnull,
    }
    return measure([sys.executable, str(PROJECT / "entrypoint.py"), str(script)], environment)


def torchrun(script: Path) -> Cost:
    flags = ["--nnodes=1", "--nproc-per-node=2", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={PORT}"]
    return measure(
        [sys.executable, "-m", "torch.distributed.run", *flags, str(script)], {**os.environ, "OMP_NUM_THREADS": "1"}
    )


def measure(command: list[str], environment: dict[str, str]) -> Cost:
    before = os.times()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # WNOWAIT leaves the ended process readable in /proc, where its own CPU stands apart from its children's.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    own = own_cpu(child.pid)
    if child.wait() != 0:
        raise SystemExit(f"{' '.join(command)} ended with exit code {child.returncode}")
    after = os.times()
    tree = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(own=own, tree=tree, wall=after.elapsed - before.elapsed)


def own_cpu(pid: int) -> float:
    """CPU seconds of one process without its children: fields 14 and 15 of /proc/PID/stat (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
