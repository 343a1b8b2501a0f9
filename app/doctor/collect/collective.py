"""This node's part of the all-reduce: torchrun as a child, its log, NCCL's log, and the bytes that interfaces moved."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from app.config.project import PROJECT
from app.doctor.cluster_checks.transport import Collective, carrier, read_nccl
from app.doctor.facts import Facts
from app.doctor.protocol import ALL_REDUCE
from app.engine import torchrun
from app.host import Host
from app.host.files import entries, number
from app.known_errors.diagnose import diagnose
from app.plan import Plan
from app.plan.rdma_access import direct

LAUNCHER_WORDS = 4
"""Of torchrun.command_line: the interpreter, -P, the agent that reports to a supervisor, which doctor has not, and its
own flag."""


async def all_reduce(facts: Facts, plan: Plan, run_id: str, place: int, nnodes: int) -> Collective:
    """Runs torchrun for at most ALL_REDUCE seconds and reads what it left. Never raises for what torchrun does."""
    nproc = plan.workers.nproc if plan.workers.backend == "nccl" else 1 if nnodes > 1 else min(plan.workers.nproc, 2)
    expected = Collective(
        backend=plan.workers.backend,
        ranks=nproc * nnodes,
        alone=nnodes == 1,
        interface=plan.network.interface,
        transport=plan.network.transport,
        expects_direct=bool(direct(facts.host)),
        active_ports=sum(port.state == "ACTIVE" for port in facts.host.rdma_ports),
    )
    with tempfile.TemporaryDirectory(prefix="doctor-") as name:
        folder = Path(name)
        (folder / "logs").mkdir()
        changed = replace(
            plan,
            script=replace(plan.script, command=("-m", "app.doctor.allreduce"), run_dir=folder),
            workers=replace(plan.workers, nproc=nproc),
        )
        command = torchrun.command_line(
            changed,
            node_rank=place,
            nnodes=nnodes,
            master_addr=plan.network.master_addr,
            master_port=plan.network.master_port,
            run_id=run_id,
        )
        engine = [sys.executable, "-m", "torch.distributed.run", *command[LAUNCHER_WORDS:]]
        before = _bytes()
        failure = await _run(engine, _environment(changed, folder, run_id), folder / "output")
        moved = _bytes()
        log = read_nccl(_text(*sorted(folder.glob("nccl.*"))))
        result = folder / "result.json"
        if failure or not result.exists():
            return replace(expected, failure=failure or "it left no result", log=log)
        found = json.loads(result.read_text())
    if not found["correct"]:
        wrong = "its result is WRONG: memory or network corrupt data. Do not train on this cluster."
        return replace(expected, failure=wrong, log=log)
    ranks = int(found["ranks"])
    through = carrier(before, moved, int(0.9 * found["bytes"]))
    return replace(
        expected,
        ranks=ranks,
        # As nccl-tests: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
        bus_bandwidth=found["size"] / found["seconds"] * 2 * (ranks - 1) / ranks,
        # RDMA passes the interfaces' counters by; what else they moved says nothing.
        carrier=""
        if nnodes == 1 or (plan.workers.backend == "nccl" and log.network != "Socket")
        else _above(facts.host, plan, through),
        log=log,
    )


def _environment(plan: Plan, folder: Path, run_id: str) -> dict[str, str]:
    inherited = torchrun.environment(plan, os.environ, run_id=run_id)
    path = inherited.get("PYTHONPATH")
    return {
        **inherited,
        "PYTHONPATH": f"{PROJECT}:{path}" if path else str(PROJECT),
        "DOCTOR_RESULT": str(folder / "result.json"),
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,NET",
        "NCCL_DEBUG_FILE": str(folder / "nccl.%h.%p"),
    }


async def _run(command: list[str], env: dict[str, str], output: Path) -> str:
    """Why it failed; "" if it did not."""
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        async with asyncio.timeout(ALL_REDUCE):
            code = await process.wait()
    except TimeoutError:
        return f"it did not end within {ALL_REDUCE:.0f} s. {_diagnosis(_text(output))}".strip()
    finally:
        # torchrun's workers die with it; the group is torchrun and whatever it started without a group of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return (_diagnosis(_text(output)) or f"torchrun ended with {code}") if code else ""


def _diagnosis(output: str) -> str:
    known = diagnose(output)
    if known is not None:
        return f"{known.line} - {known.error.cause} {known.error.fix}"
    errors = [line for line in output.splitlines() if "Error" in line]
    return errors[0].strip()[:300] if errors else ""


def _text(*files: Path) -> str:
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def _bytes() -> dict[str, int]:
    base = Path("/sys/class/net")
    counts = {name: number(base / name / "statistics/tx_bytes") for name in entries(base)}
    return {name: count for name, count in counts.items() if count is not None}


def _above(host: Host, plan: Plan, name: str) -> str:
    """A bond's member or a VLAN's parent carries what was given to the bond or VLAN."""
    nic = next((each for each in host.nics if each.name == plan.network.interface), None)
    below = set(nic.lower) if nic else set()
    below |= {lower for each in host.nics if each.name in below for lower in each.lower}
    return plan.network.interface if name in below else name
