"""What our entrypoint adds to plain torchrun: `python -m benchmarks.launch_overhead`.

The same script, one node, two processes, started in turn by `python entrypoint.py` and by `torchrun`; the entrypoint's
own CPU time (its children left out) is what a user pays on top. What of it comes before the start of the preloaded
process is measured apart: torch is loaded no sooner. Linux only.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks import pairs

PAIRS = 7
SCRIPT = "import os\n"
TO_THE_SERVER = """
import os, runpy, subprocess, sys, time
started = subprocess.Popen.__init__
def start(self, command, *rest, **named):
    if any("preload.py" in str(word) for word in command):
        os.write(1, f"spent {time.process_time()}".encode())
        os._exit(0)
    return started(self, command, *rest, **named)
subprocess.Popen.__init__ = start
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Cost(NamedTuple):
    """Seconds of one run: CPU of the first process alone, CPU of it and all its descendants, wall clock."""

    own: float
    tree: float
    wall: float


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "nothing.py"
        script.write_text(SCRIPT)
        ours, plain, early = [], [], []
        for pair in range(PAIRS + 1):
            costs = (entrypoint(script, folder), torchrun(script))
            before = to_the_server(script, folder)
            if pair:
                early.append(1000 * before)
                ours.append(costs[0])
                plain.append(costs[1])
    own = sorted(1000 * cost.own for cost in ours)
    print(
        f"entrypoint's own CPU: median {statistics.median(own):.0f} ms, {own[0]:.0f} to {own[-1]:.0f} in {PAIRS} runs"
    )
    told = f"median {statistics.median(early):.0f} ms, {min(early):.0f} to {max(early):.0f}"
    print(f"of it before the preloaded process is started: {told}")
    print("entrypoint / torchrun, pair by pair:")
    print(f"  CPU of the whole start  {ratios([cost.tree for cost in ours], [cost.tree for cost in plain])}")
    print(f"  wall clock              {ratios([cost.wall for cost in ours], [cost.wall for cost in plain])}")
    return 0


def ratios(ours: list[float], plain: list[float]) -> str:
    found = sorted(a / b for a, b in zip(ours, plain, strict=True))
    return f"median {statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})"


def entrypoint(script: Path, folder: str) -> Cost:
    return measure(pairs.ours(str(script)), pairs.settings(Path(folder)))


def torchrun(script: Path) -> Cost:
    return measure(pairs.torchrun(str(script)), pairs.environ())


def to_the_server(script: Path, folder: str) -> float:
    """Seconds of the entrypoint's CPU before it starts the preloaded process."""
    python, *words = pairs.ours(str(script))
    command, environ = [python, "-c", TO_THE_SERVER, *words], pairs.settings(Path(folder))
    said = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    return float(said.rpartition("spent ")[2])


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
