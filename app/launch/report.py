"""What went wrong on this node: one folder after a failed job, read from what torchrun and the kernel left.

`RUN_DIR/report/node1/report.json` has everything, `report.txt` the fifteen lines that a person reads first.
"""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from app.launch import hang
from app.launch.exitcodes import ExitCode
from app.launch.host.files import entries, number, text
from app.launch.host.limits import control_groups
from app.launch.plan import Plan

LAST_LINES = 40
READ_BYTES = 1 << 20
"""Of the end of each log: where the cause stands, and no more than can be searched in a moment."""
NIC_COUNTERS = ("rx_errors", "tx_errors", "rx_crc_errors", "rx_missed_errors", "tx_carrier_errors")
WIDTH = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One failed round of this node, as torchrun recorded it."""

    run_id: str
    message: str
    """The first failing worker's exception."""
    traceback: str
    exitcode: int
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    node_rank: int
    nodes: int
    address: str
    run_name: str
    time: float
    code: int
    verdict: str
    rounds: tuple[Round, ...]
    """Oldest first; only those in which a worker of this node failed with an exception."""
    logs: Mapping[str, tuple[str, ...]]
    """The last lines of each worker of the last round, by `local rank 0 stderr`."""
    counters: Mapping[str, int]
    """What grew since the start: errors of network cards and RDMA ports, links that went down, kills for memory."""
    symptom: str
    line: str
    cause: str
    cure: str
    """A known error, "" where none was recognised; docs/troubleshooting.md has an entry of that name."""
    flight_records: tuple[str, ...]
    stalls: tuple[str, ...]
    """Files with the stacks of ranks that stood still at the end (stall.py)."""
    decisions: tuple[tuple[str, str, str], ...]
    """(name, value, source) of the plan."""


def read_counters(root: Path = Path("/")) -> dict[str, int]:
    """Error counters of this machine's network, and how often the control group killed for memory."""
    found: dict[str, int] = {}
    net = root / "sys/class/net"
    for name in entries(net):
        for counter in NIC_COUNTERS:
            found[f"{name} {counter}"] = number(net / name / "statistics" / counter) or 0
        found[f"{name} link went down"] = number(net / name / "carrier_down_count") or 0
    for device in entries(root / "sys/class/infiniband"):
        for port in entries(root / "sys/class/infiniband" / device / "ports"):
            base = root / "sys/class/infiniband" / device / "ports" / port / "counters"
            for counter in ("symbol_error", "link_downed", "link_error_recovery", "port_rcv_errors"):
                found[f"{device}:{port} {counter}"] = number(base / counter) or 0
    found["kills for memory"] = _oom_kills(root)
    return found


def _oom_kills(root: Path) -> int:
    groups = control_groups(root)
    kills = [0]
    for controller, name in (("", "memory.events"), ("memory", "memory.oom_control")):
        for folder in groups.get(controller, []):
            told = text(folder / name) or ""
            kills += [int(count) for count in re.findall(r"^oom_kill (\d+)$", told, re.MULTILINE)]
    return max(kills)


def make_report(plan: Plan, code: int, verdict: str, before: Mapping[str, int], started: float) -> Report:
    """All that this node knows of its failure; reads logs that are newer than `started`. Never raises OSError."""
    # The table of known errors is for bad days only, and costs every start otherwise.
    from app.launch.symptoms import diagnose

    logs = plan.run_dir / "logs"
    rounds = tuple(sorted(_rounds(logs, started), key=lambda each: each.time))
    texts = _last_round(logs, started)
    symptom = diagnose("\n".join([*(each.traceback for each in rounds[-1:]), *texts.values(), verdict]))
    after = read_counters()
    return Report(
        node_rank=plan.node_rank,
        nodes=len(plan.nodes),
        address=plan.address,
        run_name=plan.run_name,
        time=time.time(),
        code=code,
        verdict=verdict,
        rounds=rounds,
        logs={name: tuple(content.splitlines()[-LAST_LINES:]) for name, content in texts.items()},
        counters={name: after[name] - count for name, count in before.items() if after.get(name, count) > count},
        symptom=symptom.id if symptom else "",
        line=symptom.line if symptom else "",
        cause=symptom.cause if symptom else "",
        cure=symptom.cure if symptom else "",
        flight_records=tuple(sorted(str(file) for file in logs.glob("flight_recorder_rank_*"))),
        stalls=tuple(sorted(str(file) for file in hang.folder(plan).glob("rank*.json"))),
        decisions=tuple((each.name, each.value, each.source) for each in plan.decisions),
    )


def _rounds(logs: Path, started: float) -> list[Round]:
    found = []
    for file in logs.glob("*.error.json"):
        try:
            # As torch's ErrorHandler and dump_error_file write it (elastic/multiprocessing/errors, torch 2.13).
            fields = json.loads(file.read_text(encoding="utf-8"))["message"]
            extra = fields["extraInfo"]
            each = Round(
                run_id=file.name.removesuffix(".error.json"),
                message=str(fields["message"]),
                traceback=str(extra.get("py_callstack", "")),
                exitcode=int(fields.get("errorCode", 1)),
                time=float(extra.get("timestamp", file.stat().st_mtime)),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if each.time >= started - 1:
            found.append(each)
    return found


def _last_round(logs: Path, started: float) -> dict[str, str]:
    """The ends of the workers' logs of the newest round."""
    rounds = [(folder.stat().st_mtime, folder) for folder in logs.glob("*/attempt_0") if folder.is_dir()]
    newest = max(rounds, default=(0.0, None))
    if newest[1] is None or newest[0] < started - 1:
        return {}
    files = sorted(newest[1].glob("*/std*.log"))
    return {f"local rank {file.parent.name} {file.stem}": _end_of(file) for file in files}


def _end_of(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - READ_BYTES))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def summary(report: Report, folder: Path) -> str:
    """At most fifteen lines: who, what, since when, most likely cause, cure."""
    when = datetime.fromtimestamp(report.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    name = ExitCode(report.code).name if report.code in {*ExitCode} else "unknown"
    lines = [
        f"run {report.run_name}, node {report.node_rank} of {report.nodes} ({report.address}), {when}",
        *(f"verdict: {line}" for line in report.verdict.splitlines()[:2]),
        f"exit code: {report.code} ({name})",
    ]
    if report.rounds:
        last = report.rounds[-1]
        at = [line.strip() for line in last.traceback.splitlines() if line.strip().startswith("File ")]
        lines += [f"first error here: {last.message.splitlines()[0] if last.message else '(no text)'}"]
        lines += [f"at: {at[-1]}"] if at else []
        lines += [f"failed rounds here: {len(report.rounds)}"] if len(report.rounds) > 1 else []
    else:
        lines.append("first error here: none, the cause is on another node or outside Python")
    if report.symptom:
        lines += [f"known as: {report.symptom} - {report.line}", f"cause: {report.cause}", f"cure: {report.cure}"]
    grown = ", ".join(f"{name} +{count}" for name, count in report.counters.items())
    lines += [f"since the start: {grown}"] if grown else []
    lines += [f"flight records: {len(report.flight_records)} files"] if report.flight_records else []
    lines += [f"stacks of ranks that stood still: {', '.join(report.stalls[:2])} ..."] if report.stalls else []
    return "\n".join(line[:WIDTH] for line in [*lines, f"more: {folder}"])


def write_report(plan: Plan, report: Report) -> Path:
    """Writes both files, whole or not at all; returns their folder. Raises OSError."""
    folder = plan.run_dir / "report" / f"node{plan.node_rank}"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"report.json": json.dumps(asdict(report), indent=1), "report.txt": summary(report, folder) + "\n"}
    for name, written in content.items():
        part = folder / f".{name}.{os.getpid()}"
        part.write_text(written, encoding="utf-8")
        part.replace(folder / name)
    return folder


def stored(run_dir: Path) -> Sequence[Path]:
    """The folders of reports below a run's folder, in rank order. A job that ended well may have left stacks there."""
    found = (file.parent for file in (run_dir / "report").glob("node*/report.txt"))
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("node") or 0))
