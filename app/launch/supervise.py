"""Runs one node's part of the job, from the roll call to the exit code: the one thing the entrypoint calls to run."""

import asyncio
import os
import signal
import sys
import time

from app.launch.exitcodes import ExitCode
from app.launch.plan import Plan
from app.launch.torchrun import Failure, Outcome, Torchrun, adopt_orphans, command_line, environment, sweep


def supervise(plan: Plan) -> int:
    """Runs torchrun on this node and looks after it; returns the exit code (`ExitCode`)."""
    adopt_orphans()
    return asyncio.run(_one_round(plan))


async def _one_round(plan: Plan) -> int:
    run_id = f"{plan.run_name}-0"
    (plan.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    command = command_line(
        plan,
        node_rank=plan.node_rank,
        nnodes=len(plan.nodes),
        master_addr=plan.master_addr,
        master_port=plan.master_port,
        run_id=run_id,
    )
    torchrun = Torchrun(command, environment(plan, os.environ, run_id=run_id))
    stops = 0

    def stop() -> None:
        nonlocal stops
        stops += 1
        torchrun.terminate() if stops == 1 else torchrun.kill()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    outcome = await torchrun.watch(lambda: None)
    sweep()
    if outcome.code == 0:
        return ExitCode.DONE
    if stops:
        return ExitCode.STOPPED
    print(f"torchrun-compose: {_culprit(plan, outcome)}", file=sys.stderr, flush=True)
    return ExitCode.TRAINING


def _culprit(plan: Plan, outcome: Outcome) -> str:
    failure = next(iter(outcome.failures), Failure(rank=-1, exitcode=outcome.code, text="", time=time.time()))
    who = "torchrun" if failure.rank < 0 else f"rank {failure.rank}"
    what = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else signal.Signals(-failure.exitcode).name
    return f"node {plan.node_rank} ({plan.address}) {who}: {what} {failure.text}".rstrip()
