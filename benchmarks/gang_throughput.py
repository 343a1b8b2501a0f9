"""Training speed under the gang against plain torchrun: `python -m benchmarks.gang_throughput`.

Two nodes of one rank each on this machine's loopback addresses, the same script and flags. Runs alternate, and each
pair gives one ratio, since the speed of a shared machine drifts. Start-up is left out: speed is that of the steps.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.container_speed import speed
from tests.native.ports import free_port

PROJECT = Path(__file__).resolve().parent.parent
PAIRS = 7
FLAGS = "--steps=150 --log-every=10 --eval-every=0 --checkpoint-every=50 --sample=0"


def main() -> int:
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(PAIRS):
            ours = run([[sys.executable, str(PROJECT / "entrypoint.py")]] * 2, Path(folder) / f"ours{pair}")
            plain = run([torchrun(rank) for rank in range(2)], Path(folder) / f"plain{pair}")
            ratios.append(ours / plain)
            print(f"with the gang {ours:,.0f} tokens/s, plain torchrun {plain:,.0f}: {ratios[-1]:.3f}", flush=True)
    middle = statistics.median(ratios)
    print(f"gang / plain, median of {PAIRS} pairs: {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return 0


def torchrun(rank: int) -> list[str]:
    """Node `rank`'s command as the classic shell script has it."""
    where = ["--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1", "--master-addr=127.0.0.1", "--master-port=PORT"]
    return [sys.executable, "-m", "torch.distributed.run", *where, "-m", "app.train", *FLAGS.split()]


def run(commands: list[list[str]], runs: Path) -> float:
    """Tokens/s of one training on two nodes, each started with its command."""
    port = str(free_port())
    nodes = []
    for rank, command in enumerate(commands):
        environment = {
            **os.environ,
            "NODES": "127.0.0.1,127.0.0.2",
            "NODE_RANK": str(rank),
            "NPROC_PER_NODE": "1",
            "MASTER_PORT": port,
            "TRAIN_ARGS": FLAGS,
            "RUNS_ROOT": str(runs / str(rank)),
            "RUN_DIR": str(runs / str(rank)),
            "ENV_FILE": os.devnull,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        words = [word.replace("PORT", port) for word in command]
        nodes.append(subprocess.Popen(words, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True))
    said = [node.communicate(timeout=300)[0] for node in nodes]
    if any(node.returncode for node in nodes):
        raise SystemExit("\n".join(said))
    return speed(said[0])


if __name__ == "__main__":
    sys.exit(main())
