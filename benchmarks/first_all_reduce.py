"""Launch to the first all-reduce of two ranks on one node: `python -m benchmarks.first_all_reduce`.

In turn: plain torchrun, ours, ours with PRELOAD= (nothing preloaded), and ours from `kill -9` of a rank to the next
all-reduce. The script is torch, gloo and one all-reduce; times are wall clock, ratios pair by pair.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PAIRS = 5
PORT = 29400
REDUCE = """
import os, signal, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
one = torch.ones(1)
dist.all_reduce(one)
sys.stdout.write(f"first {time.time()}\\n")
mark = sys.argv[1] if len(sys.argv) > 1 else ""
if mark and os.environ["RANK"] == "1" and not os.path.exists(mark):
    open(mark, "w").close()
    sys.stdout.write(f"killed {time.time()}\\n")
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
dist.destroy_process_group()
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "reduce.py"
        script.write_text(REDUCE)
        plain, warm, cold, again = (list[float]() for _ in range(4))
        for pair in range(PAIRS + 1):
            costs = [torchrun(script), ours(script, folder, "torch")[0], ours(script, folder, "")[0]]
            restart = ours(script, folder, "torch", str(folder / f"mark{pair}"))[1]
            if pair:
                for kept, cost in zip((plain, warm, cold, again), (*costs, restart), strict=True):
                    kept.append(cost)
    told = {"torchrun": plain, "ours": warm, "ours, PRELOAD=": cold, "ours, kill -9 to the next all-reduce": again}
    for what, seconds in told.items():
        print(
            f"{what:40} median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})", end="  "
        )
        ratios = [one / other for one, other in zip(seconds, plain, strict=True)]
        print(f"/ torchrun {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return 0


def torchrun(script: Path) -> float:
    flags = ["--nnodes=1", "--nproc-per-node=2", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={PORT}"]
    return first([sys.executable, "-m", "torch.distributed.run", *flags, str(script)], {"OMP_NUM_THREADS": "1"})[0]


def ours(script: Path, folder: Path, preload: str, *arguments: str) -> tuple[float, float]:
    settings = {"RUNS_ROOT": str(folder), "NPROC_PER_NODE": "2", "MASTER_PORT": str(PORT), "ENV_FILE": os.devnull}
    settings |= {"PRELOAD": preload, "OMP_NUM_THREADS": "1"}
    return first([sys.executable, str(PROJECT / "entrypoint.py"), "run", str(script), *arguments], settings)


def first(command: list[str], settings: dict[str, str]) -> tuple[float, float]:
    """Seconds to the first all-reduce of both ranks, and from the kill to the last one."""
    begun = time.time()
    ended = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
    seen = sorted(float(each) for each in re.findall(r"first (\S+)", ended.stdout))
    killed = [float(each) for each in re.findall(r"killed (\S+)", ended.stdout)]
    return seen[1] - begun, seen[-1] - killed[0] if killed else 0.0


if __name__ == "__main__":
    sys.exit(main())
