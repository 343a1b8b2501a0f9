"""What went wrong on this node: one folder after a failed job, read from what torchrun and the kernel left.

`RUN_DIR/report/node1/report.json` has everything, `report.txt` the fifteen lines that a person reads first.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from app.config.exitcodes import ExitCode
from app.config.redaction import redact, redact_data
from app.host.accelerators import recent_faults
from app.host.files import entries, number, text
from app.host.limits import control_groups
from app.plan import Plan
from app.report.history import RoundRecord, private, read_left_out, read_restarts, read_rounds, restart_in_words
from app.report.redaction import plan_secrets

LAST_LINES = 40
READ_BYTES = 1 << 20
"""Of the end of each log: where the cause stands, and no more than can be searched in a moment."""
NIC_COUNTERS = ("rx_errors", "tx_errors", "rx_crc_errors", "rx_missed_errors", "tx_carrier_errors")
MEMORY_KILLS = "kills for memory"
WIDTH = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    node_rank: int
    nodes: int
    address: str
    run_name: str
    time: float
    code: int
    verdict: str
    rounds: tuple[RoundRecord, ...]
    """All of this job, oldest first; those that ended well here, too."""
    logs: Mapping[str, tuple[str, ...]]
    """The last lines of each worker of the last round, by `local rank 0 stderr`."""
    counters: Mapping[str, int]
    """What grew since the start: errors of network cards and RDMA ports, links that went down, kills for memory."""
    counters_before: Mapping[str, int]
    counters_after: Mapping[str, int]
    xids: tuple[str, ...]
    """Errors of GPUs that the kernel has logged since the start; only root outside a container sees them."""
    known_error: str
    line: str
    cause: str
    fix: str
    """A known error, "" where none was recognised; docs/errors has an entry of that name."""
    names_cause: bool
    """The known error says more than that another rank or node failed first."""
    left_out: tuple[str, ...]
    """Modules of PRELOAD that broke the start, each with what was wrong; the rounds went on without them."""
    restarts: tuple[Mapping[str, float], ...]
    """Seconds of each part of each restart, oldest first."""
    flight_records: tuple[str, ...]
    stalls: tuple[str, ...]
    """Files with the stacks of ranks that stood still at the end (watchdog.py)."""
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
    found[MEMORY_KILLS] = _oom_kills(root)
    return found


def _oom_kills(root: Path) -> int:
    groups = control_groups(root)
    kills = [0]
    for controller, name in (("", "memory.events"), ("memory", "memory.oom_control")):
        for folder in groups.get(controller, []):
            told = text(folder / name) or ""
            kills += [int(count) for count in re.findall(r"^oom_kill (\d+)$", told, re.MULTILINE)]
    return max(kills)


def make_report(plan: Plan, code: int, verdict: str, before: Mapping[str, int], started: float) -> NodeReport:
    """All that this node knows of its failure; reads logs that are newer than `started`. Never raises OSError."""
    # The table of known errors is for bad days only, and costs every start otherwise.
    from app.known_errors.catalog import CONSEQUENCE
    from app.report.diagnosis import diagnosis, in_own_words

    logs = plan.log_dir
    rounds = read_rounds(logs, started)
    texts = _last_round(logs, started)
    after = read_counters()
    grown = {name: after[name] - count for name, count in before.items() if after.get(name, count) > count}
    known = diagnosis(rounds[-1] if rounds else None, texts, verdict, memory_kills=MEMORY_KILLS in grown)
    return NodeReport(
        node_rank=plan.nodes.rank,
        nodes=plan.nodes.count,
        address=plan.network.address,
        run_name=plan.run_name,
        time=time.time(),
        code=code,
        verdict=verdict,
        rounds=(*rounds[:-1], *(in_own_words(each, texts) for each in rounds[-1:])),
        logs={name: tuple(content.splitlines()[-LAST_LINES:]) for name, content in texts.items()},
        counters=grown,
        counters_before=before,
        counters_after=after,
        xids=_xids(started),
        known_error=known.error.id if known else "",
        line=known.line if known else "",
        cause=known.error.cause if known else "",
        fix=known.error.fix if known else "",
        names_cause=known is not None and known.error.rank > CONSEQUENCE,
        left_out=read_left_out(logs, started),
        restarts=read_restarts(logs, started),
        flight_records=tuple(sorted(str(file) for file in logs.glob("flight_recorder_rank_*"))),
        stalls=tuple(sorted(str(file) for file in plan.stall_dir.glob("rank*.json"))),
        decisions=tuple((each.name, each.value, each.source) for each in plan.decisions),
    )


def _xids(started: float) -> tuple[str, ...]:
    # The kernel's clock begins at the start of the machine.
    since = time.monotonic() - (time.time() - started)
    return tuple(f"{fault.bus} {fault.name}" for fault in recent_faults(since))


def _last_round(logs: Path, started: float) -> dict[str, str]:
    """The ends of the workers' logs of the newest round."""
    rounds = [(folder.stat().st_mtime, folder) for folder in logs.glob("*/attempt_0") if folder.is_dir()]
    newest = max(rounds, default=(0.0, None))
    if newest[1] is None or newest[0] < started - 1:
        return {}
    files = sorted(newest[1].glob("*/std*.log"))
    return {f"local rank {file.parent.name} {file.stem}": end_of(file) for file in files}


def end_of(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - READ_BYTES))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def summary(report: NodeReport, folder: Path) -> str:
    """At most fifteen lines: who, what, since when, most likely cause, fix."""
    when = datetime.fromtimestamp(report.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    name = ExitCode(report.code).name if report.code in {*ExitCode} else "unknown"
    lines = [
        f"run {report.run_name}, node {report.node_rank} of {report.nodes} ({report.address}), {when}",
        *(f"verdict: {line}" for line in report.verdict.splitlines()[:2]),
        f"exit code: {report.code} ({name})",
    ]
    lines += _first_error(report.rounds)
    failed = sum(each.failed for each in report.rounds)
    told = [f"failed rounds here: {failed}"] if failed > 1 else []
    told += [f"last {restart_in_words(report.restarts[-1])}"] if report.restarts else []
    lines += ["; ".join(told)] if told else []
    if report.known_error:
        lines += [f"known as: {report.known_error} - {report.line}", f"cause: {report.cause}", f"fix: {report.fix}"]
    grown = ", ".join(f"{name} +{count}" for name, count in report.counters.items())
    lines += [f"since the start: {grown}"] if grown else []
    lines += [f"errors of GPUs since the start: {', '.join(report.xids)}"] if report.xids else []
    lines += [f"PRELOAD went without {'; '.join(report.left_out)}"] if report.left_out else []
    files = [f"flight records: {len(report.flight_records)} files"] if report.flight_records else []
    files += [f"stacks of ranks that stood still: {', '.join(report.stalls[:2])} ..."] if report.stalls else []
    lines += ["; ".join(files)] if files else []
    return "\n".join(line[:WIDTH] for line in [*lines, f"more: {folder}"])


def _first_error(rounds: Sequence[RoundRecord]) -> list[str]:
    failed = [each for each in rounds if each.failed]
    if not failed or not rounds[-1].failed:
        lines = ["first error here: none, no worker of this node failed by itself"]
    else:
        at = own_line(failed[-1].traceback)
        lines = [f"first error here: {failed[-1].first_error}", *([f"at: {at}"] if at else [])]
    return lines


def own_line(traceback: str) -> str:
    """The innermost place outside installed packages and Python's own library; "" in an empty traceback."""
    places = [line.strip() for line in traceback.splitlines() if line.strip().startswith("File ")]
    own = [place for place in places if not re.search(r"(site|dist)-packages/|/lib/python3|<frozen ", place)]
    return next(reversed(own or places), "")


def write_report(plan: Plan, report: NodeReport) -> Path:
    """Writes both files, whole or not at all, without secrets; returns their folder. Raises OSError."""
    folder = plan.report_dir
    folder.mkdir(parents=True, exist_ok=True)
    secrets = plan_secrets(plan, os.environ)
    told = redact(summary(report, folder), secrets) + "\n"
    content = {"report.json": json.dumps(redact_data(asdict(report), secrets), indent=1), "report.txt": told}
    for name, written in content.items():
        part = folder / f".{name}.{os.getpid()}"
        part.unlink(missing_ok=True)
        with open(part, "x", encoding="utf-8", errors="backslashreplace", opener=private) as file:
            file.write(written)
        part.replace(folder / name)
    return folder


def forget_report(plan: Plan) -> None:
    """For a job that ended well: what an earlier one left would be taken for its report. Best effort."""
    folder = plan.report_dir
    with contextlib.suppress(OSError):
        for name in ("report.txt", "report.json"):
            (folder / name).unlink(missing_ok=True)
        # Stacks of ranks that stood still for a while stay.
        folder.rmdir()
        folder.parent.rmdir()


def stored(run_dir: Path) -> Sequence[Path]:
    """The folders of reports below a run's folder, in rank order. A job that ended well may have left stacks there.

    Raises OSError where they cannot be looked for."""
    try:
        folders = [*(run_dir / "report").iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [each for each in folders if re.fullmatch(r"node[0-9]+", each.name) and (each / "report.txt").exists()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("node")))
