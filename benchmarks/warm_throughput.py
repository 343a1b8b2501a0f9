"""Training speed of ranks that were forked, beside plain torchrun's: `python -m benchmarks.warm_throughput [PAIRS]`.

The shipped script on two ranks, in turn; CPU time of all processes of a run, start-up taken out by the difference of a
long and a short run, as tokens per CPU-second.
"""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.pairs import PROJECT, environ, ours, settings, tell, torchrun

PAIRS, SHORT, LONG = 5, 10, 60
SEQUENCES, CONTEXT = 32, 128
SCRIPT = ["-m", "app.train", f"--batch={SEQUENCES}", "--micro-batch=16", f"--context={CONTEXT}"]
SCRIPT += ["--eval-every=0", "--sample=0", "--checkpoint-every=25"]


def main() -> int:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS
    speeds: dict[str, list[float]] = {"torchrun": [], "ours": []}
    for pair in range(pairs):
        # In turn the first: a machine that becomes slower or faster meets both alike.
        for what in [*speeds] if pair % 2 else reversed([*speeds]):
            seconds = cpu_seconds(what, LONG) - cpu_seconds(what, SHORT)
            speeds[what].append((LONG - SHORT) * SEQUENCES * CONTEXT / seconds)
    tell(speeds, "torchrun", "tokens per CPU-second", 0)
    return 0


def cpu_seconds(what: str, steps: int) -> float:
    with tempfile.TemporaryDirectory() as name:
        script = [*SCRIPT, f"--steps={steps}"]
        if what == "torchrun":
            return spent(torchrun(*script), {**environ(), "RUN_DIR": name})
        return spent(ours(*script), settings(Path(name)))


def spent(command: Sequence[str], env: Mapping[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
