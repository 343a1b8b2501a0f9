"""This node's part of bench's check: torchrun as a child, its figures, NCCL's log, the bytes that interfaces moved."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.config.project import PROJECT
from app.doctor.cluster_checks.speed import read_speeds
from app.doctor.cluster_checks.transport import CollectiveCheck, carrier, read_nccl
from app.doctor.facts import Facts
from app.doctor.protocol import COLLECTIVE
from app.engine.command import environment
from app.host import Host
from app.host.files import entries, number
from app.known_errors.diagnose import diagnose
from app.plan import Plan


async def all_reduce(facts: Facts, plan: Plan, run_id: str, place: int, nnodes: int) -> CollectiveCheck:
    """Runs torchrun for at most COLLECTIVE seconds and reads what it left. Never raises for what torchrun does."""
    nproc = _processes(plan, nnodes)
    expected = CollectiveCheck(
        vendor=facts.host.gpus.vendor,
        backend=plan.workers.backend,
        ranks=nproc * nnodes,
        alone=nnodes == 1,
        interface=plan.network.interface,
        transport=plan.network.transport,
        expects_direct=plan.network.transport != "sockets" and facts.host.gpus.direct != "",
        active_ports=sum(port.state == "ACTIVE" for port in facts.host.rdma_ports),
    )
    with tempfile.TemporaryDirectory(prefix="doctor-") as name:
        folder = Path(name)
        before = _bytes()
        failure = await _run(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *(f"--nnodes={nnodes}", f"--nproc-per-node={nproc}", f"--node-rank={place}"),
                *(f"--master-addr={plan.network.master_addr}", f"--master-port={plan.network.master_port}"),
                *(f"--rdzv-id={run_id}", "--max-restarts=0", f"--log-dir={folder}", "--tee=3"),
                *("-m", "app.bench", f"--check={folder / 'result.json'}"),
            ],
            _environment(plan, folder, run_id),
            folder / "output",
        )
        moved = _bytes()
        expected = replace(expected, log=read_nccl(_text(*sorted(folder.glob("nccl.*")))))
        found = _read(folder / "result.json")
    if failure or not found:
        return replace(expected, failure=failure or "it left no result")
    return replace(_judged(expected, found, place), carrier=_carrier(facts.host, expected, before, moved, found))


def _processes(plan: Plan, nnodes: int) -> int:
    """One GPU is one process; CPUs have nothing to show that one process a node (two on one node alone) does not."""
    if plan.workers.backend == "nccl":
        return plan.workers.nproc
    return 1 if nnodes > 1 else min(plan.workers.nproc, 2)


def _read(file: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _judged(expected: CollectiveCheck, found: Mapping[str, Any], place: int) -> CollectiveCheck:
    measures = found["measures"]
    if not all(measure["correct"] for measure in measures):
        wrong = "its result is WRONG: memory or network corrupt data. Do not train on this cluster."
        return replace(expected, failure=wrong)
    if found["backend"] != expected.backend:
        return replace(expected, failure=f"torch sees no GPU here: it ran over {found['backend']}.")
    return replace(
        expected,
        ranks=found["ranks"],
        bus_bandwidth=max(measure["bus_bandwidth"] for measure in measures),
        speeds=read_speeds(found, place),
    )


def _carrier(
    host: Host, expected: CollectiveCheck, before: Mapping[str, int], after: Mapping[str, int], found: Mapping[str, Any]
) -> str:
    """The interface that carried it; "" where its counters cannot tell: on one node, and with RDMA, which passes them
    by."""
    if expected.alone or (expected.backend == "nccl" and expected.log.network != "Socket"):
        return ""
    # Each size is sent at least three times: once to check its result, once to see how long it takes, once timed.
    payload = sum(3 * measure["size"] for measure in found["measures"])
    through = carrier(before, after, int(0.9 * payload))
    return expected.interface if through in _below(host, expected.interface) else through


def _below(host: Host, interface: str) -> set[str]:
    """A bond's member or a VLAN's parent carries what was given to the bond or VLAN."""
    nic = next((each for each in host.nics if each.name == interface), None)
    below = set(nic.lower) if nic else set()
    return below | {lower for each in host.nics if each.name in below for lower in each.lower}


def _environment(plan: Plan, folder: Path, run_id: str) -> dict[str, str]:
    inherited = environment(plan, os.environ, run_id=run_id)
    path = inherited.get("PYTHONPATH")
    return {
        **inherited,
        "PYTHONPATH": f"{PROJECT}:{path}" if path else str(PROJECT),
        "TORCHELASTIC_ERROR_FILE": str(folder / "error.json"),
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
        async with asyncio.timeout(COLLECTIVE):
            code = await process.wait()
    except TimeoutError:
        return f"it did not end within {COLLECTIVE:.0f} s. {_diagnosis(_text(output))}".strip()
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
