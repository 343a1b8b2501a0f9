"""Launch to the first all-reduce of two ranks: `python -m benchmarks.first_all_reduce [PAIRS]`.

On one node, in turn: plain torchrun, ours, ours with PRELOAD= (nothing preloaded), ours from `kill -9` of a rank to
the next all-reduce, `mp.spawn`, and Accelerate's launcher with the Python that PEERS_PYTHON names (one that has it).
Then on two nodes of one rank each, both on this machine: torchrun's static rendezvous, and ours through the roll call.
The script is torch, gloo and one all-reduce; times are wall clock until the last rank has its result.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.pairs import PORT, environ, ours, settings, tell, torchrun

PAIRS = 5
REDUCE = """
import os, signal, sys, time
import torch, torch.distributed as dist
def main(rank=None):
    if rank is not None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo")
    one = torch.ones(1)
    dist.all_reduce(one)
    sys.stdout.write(f"first {time.time()}\\n")
    sys.stdout.flush()
    mark = os.environ.get("MARK")
    if mark and os.environ["RANK"] == "1" and not os.path.exists(mark):
        open(mark, "w").close()
        sys.stdout.write(f"killed {time.time()}\\n")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    dist.destroy_process_group()
if __name__ == "__main__":
    if "SPAWN" in os.environ:
        torch.multiprocessing.spawn(main, nprocs=2)
    else:
        main()
"""


def main() -> int:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "reduce.py"
        script.write_text(REDUCE)
        tell(measure(one_node(script, folder), pairs), "torchrun")
        tell(measure(two_nodes(script, folder), pairs), "torchrun, two nodes")
    return 0


def measure(ways: Mapping[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """All ways in turn; the first turn warms the machine's caches and does not count."""
    turns = [{what: way() for what, way in ways.items()} for _ in range(pairs + 1)]
    return {what: [turn[what] for turn in turns[1:]] for what in ways}


def one_node(script: Path, folder: Path) -> dict[str, Callable[[], float]]:
    plain, name = environ(), str(script)
    spawn = {**plain, "SPAWN": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
    ways = {
        "torchrun": lambda: first((torchrun(name), plain)),
        "ours": lambda: first((ours(name), settings(folder))),
        "ours, PRELOAD=": lambda: first((ours(name), settings(folder, PRELOAD=""))),
        "ours, kill -9 to the next all-reduce": lambda: again(script, folder),
        "mp.spawn": lambda: first(([sys.executable, name], spawn)),
    }
    if peers := os.environ.get("PEERS_PYTHON"):
        # With --cpu it starts several ranks by mpirun only; so it does what it does for GPUs, which is torchrun.
        flags = ["--multi_gpu", "--num_machines=1", "--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no"]
        launch = [peers, "-m", "accelerate.commands.launch", *flags, f"--main_process_port={PORT}", name]
        ways["accelerate launch"] = lambda: first((launch, plain))
    else:
        print("accelerate launch: not measured, PEERS_PYTHON names no Python that has it")
    return ways


def two_nodes(script: Path, folder: Path) -> dict[str, Callable[[], float]]:
    name, plain = str(script), environ()

    def node(rank: int) -> tuple[list[str], dict[str, str]]:
        more = {"NODES": "127.0.0.1,127.0.0.2", "NODE_RANK": str(rank)}
        return ours(name), settings(folder / f"node{rank}", 1, **more)

    return {
        "torchrun, two nodes": lambda: first(*((torchrun(name, node=n, nodes=2, nproc=1), plain) for n in range(2))),
        "ours, two nodes": lambda: first(*(node(rank) for rank in range(2))),
    }


def first(*launches: tuple[list[str], Mapping[str, str]]) -> float:
    """Seconds until both ranks have their first all-reduce."""
    begun = time.time()
    return sorted(float(each) for each in re.findall(r"first (\S+)", output(*launches)))[1] - begun


def again(script: Path, folder: Path) -> float:
    """Seconds from the kill to the next round's all-reduce."""
    with tempfile.TemporaryDirectory() as marks:
        said = output((ours(str(script)), settings(folder, MARK=f"{marks}/killed")))
    killed = re.findall(r"killed (\S+)", said)
    return max(float(each) for each in re.findall(r"first (\S+)", said)) - float(killed[0])


def output(*launches: tuple[list[str], Mapping[str, str]]) -> str:
    started = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for command, env in launches
    ]
    said = "".join(process.communicate(timeout=300)[0] for process in started)
    if any(process.returncode for process in started):
        raise SystemExit(f"{launches[0][0]} failed:\n{said}")
    return said


if __name__ == "__main__":
    sys.exit(main())
