"""Tokens per second of the training script on this machine's GPUs, and of any peer's command, in the same run.

    python benchmarks/train_gpu.py --peer "nanoGPT=python train.py config/train_gpt2.py --max_iters={steps}"

GPT-2's shape (124M), bf16, eager and compiled. A peer must train the same number of tokens a step (--batch x
--context). Wall time; the start is taken out by the difference of a long and a short run, and the runs of a round
follow one another, so that a change of the machine's load meets all of them. Never run on a GPU yet.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
GPT2 = "--layers 12 --heads 12 --width 768 --vocab 50304 --eval-every 0 --sample 0"


def main() -> None:
    """Measures, and prints a row for each command."""
    arguments = _arguments()
    torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run --standalone --nproc-per-node {arguments.ranks}"
    size = f"--batch {arguments.batch} --micro-batch {arguments.batch // arguments.ranks} --context {arguments.context}"
    ours = f"{torchrun} -m app.train {arguments.shape} {size} --steps {{steps}}"
    commands = {"app.train": ours, "app.train, compiled": f"{ours} --compile true"}
    commands |= dict(peer.split("=", 1) for peer in arguments.peer)
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            took = _seconds(command, arguments.long) - _seconds(command, arguments.short)
            rates[name].append((arguments.long - arguments.short) * arguments.batch * arguments.context / took)
    best = max(rates["app.train"])
    print("| command | tokens/s, best round | median | of app.train |\n|---|---|---|---|")
    for name, each in rates.items():
        print(f"| {name} | {max(each):,.0f} | {statistics.median(each):,.0f} | {max(each) / best:.2f} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], help="NAME=COMMAND with {steps}; repeatable")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="sequences a step, of all ranks")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--shape", default=GPT2, help="options of app.train")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", type=int, default=20, help="steps of the short run, which takes the start out")
    parser.add_argument("--long", type=int, default=120)
    return parser.parse_args()


def _seconds(command: str, steps: int) -> float:
    with tempfile.TemporaryDirectory() as run_dir:
        environ = os.environ | {"PYTHONPATH": str(ROOT), "RUN_DIR": run_dir}
        begun = time.monotonic()
        words = shlex.split(command.replace("{steps}", str(steps)))
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
