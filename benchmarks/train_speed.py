"""Tokens per CPU-second of the training script and of other loops, at nanoGPT's CPU shape, on this machine.

    python benchmarks/train_speed.py --peers-python /path/to/venv/bin/python --peer "nanoGPT=torchrun ... {steps}"

CPU time is user + system of all processes of a run; start-up is taken out by the difference of a long and a short run.
The runs of a round follow one another, so that a change of the machine's load meets all of them; the best round counts,
since load only ever adds CPU time. Accelerate and Lightning Fabric run with `--peers-python`, a Python that has them.
"""

import argparse
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/train_speed.md"
RANKS, SEQUENCES, CONTEXT = 2, 16, 128
TOKENS = RANKS * SEQUENCES * CONTEXT
OURS = (
    f"-m app.train --batch {RANKS * SEQUENCES} --micro-batch {SEQUENCES} --context {CONTEXT} --eval-every 0 --sample 0"
)


def main() -> None:
    """Measures, prints and writes the table."""
    arguments = _arguments()
    commands = _commands(arguments.peers_python) | dict(item.split("=", 1) for item in arguments.peer)
    rounds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            rounds[name].append(_milliseconds_per_step(command, arguments.short, arguments.long))
            print(f"{name}: {rounds[name][-1]:.1f} ms/step", flush=True)
    report = _report(rounds, arguments)
    print(report)
    RESULTS.write_text(report)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", type=int, default=10, help="steps of the short run")
    parser.add_argument("--long", type=int, default=110, help="steps of the long run; two checkpoints fall into it")
    parser.add_argument("--peers-python", default="", help="a Python with torch, accelerate and lightning-fabric")
    parser.add_argument("--peer", action="append", default=[], help="NAME=COMMAND with {steps}, of 2 ranks; repeatable")
    return parser.parse_args()


def _commands(peers_python: str) -> dict[str, str]:
    commands = {
        "app.train": f"{_torchrun(sys.executable)} {OURS} --steps {{steps}}",
        "the same model, bare loop": f"{_torchrun(sys.executable)} benchmarks/peers/bare.py {{steps}}",
        "nanoGPT's model in its loop": f"{_torchrun(sys.executable)} benchmarks/peers/nanogpt_like.py {{steps}}",
    }
    if peers_python:
        commands["Accelerate"] = f"{_torchrun(peers_python)} benchmarks/peers/accelerate_loop.py {{steps}}"
        commands["Lightning Fabric"] = f"{_torchrun(peers_python)} benchmarks/peers/fabric_loop.py {{steps}}"
    return commands


def _torchrun(python: str) -> str:
    return f"{shlex.quote(python)} -m torch.distributed.run --standalone --nproc-per-node {RANKS}"


def _milliseconds_per_step(command: str, short: int, long: int) -> float:
    return (_cpu_seconds(command, long) - _cpu_seconds(command, short)) / (long - short) * 1000


def _cpu_seconds(command: str, steps: int) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as run_dir:
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RUN_DIR": run_dir}
        words = shlex.split(command.replace("{steps}", str(steps)))
        done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _report(rounds: Mapping[str, list[float]], arguments: argparse.Namespace) -> str:
    ours = min(rounds["app.train"])
    rows = [
        f"| {name} | {min(times):.1f} | {statistics.median(times):.1f} | {TOKENS / min(times) * 1000:,.0f} "
        f"| {min(times) / ours:.2f} |"
        for name, times in rounds.items()
    ]
    table = "\n".join(rows)
    versions = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    return f"""# Training speed on CPU

Made by `benchmarks/train_speed.py --rounds {arguments.rounds} --short {arguments.short} --long {arguments.long}`.
{_machine()}, Python {platform.python_version()}, torch {versions.stdout.strip()}; {RANKS} ranks, OMP_NUM_THREADS=1,
fp32, 4 layers, 4 heads, width 128, context {CONTEXT}, {SEQUENCES} sequences per rank, gloo over loopback.
`app.train` agrees on stopping every step, writes metrics every 10 steps and a checkpoint every 50; the others do not.
Nothing of this says anything about a GPU.

| loop | CPU ms/step, best round | median | tokens per CPU-second | app.train is faster by a factor of |
|---|---|---|---|---|
{table}
"""


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
