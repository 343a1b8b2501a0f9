"""What torchrun is started with: its flags and its environment. Pure."""

import sys
from collections.abc import Mapping
from pathlib import Path

from app.plan import Plan

AGENT = Path(__file__).with_name("agent.py")
WORKER = Path(__file__).with_name("worker.py")


def command_line(
    plan: Plan, *, node_rank: int, nnodes: int, master_addr: str, master_port: int, run_id: str
) -> list[str]:
    """torchrun's own flags, explicit: static rendezvous keeps the ranks ours, and a restart is a new round of the
    whole gang, never torchrun's own (its in-place restarts read stale addresses)."""
    return [
        sys.executable,
        "-P",
        str(AGENT),
        f"--shutdown-timeout={round(plan.timeouts.stop_grace)}",
        f"--nnodes={nnodes}",
        f"--nproc-per-node={plan.workers.nproc}",
        f"--node-rank={node_rank}",
        f"--master-addr={master_addr}",
        f"--master-port={master_port}",
        f"--rdzv-id={run_id}",
        f"--rdzv-conf=timeout={max(300, round(plan.timeouts.start))}",
        "--max-restarts=0",
        f"--log-dir={plan.log_dir}",
        "--tee=3",
        str(WORKER),
        *plan.script.command,
    ]


def environment(plan: Plan, environ: Mapping[str, str], *, run_id: str) -> dict[str, str]:
    """What torchrun and the workers see: `environ` without the names the plan removes, with those it exports.

    torchrun copies the first failing worker's error, traceback included, to `RUN_ID.error.json`. Without a run id:
    what is the same in all rounds."""
    kept = {name: value for name, value in environ.items() if name not in plan.script.removed}
    prefix = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] "}
    error_file = {"TORCHELASTIC_ERROR_FILE": str(plan.log_dir / f"{run_id}.error.json")}
    return {**prefix, **kept, **dict(plan.script.env), **(error_file if run_id else {})}
