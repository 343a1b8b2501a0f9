"""The rounds of this node: how each torchrun ended, one line each in its log folder, and what its workers died of."""

import contextlib
import glob
import json
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.config.redaction import redact_data
from app.engine.outcome import Failure, Outcome
from app.plan import Plan
from app.report.redaction import plan_secrets

ROUNDS = "rounds.jsonl"
LAST_WORDS = 100
"""Lines of a log in which an error still has to do with the end: earlier ones were survived."""
ERROR = re.compile(r"^(?:\[[^\]]*\]:? ?)*((?:[\w.]*(?:Error|Exception)|[Ee]rror|ERROR)\b: .*)$", re.MULTILINE)
"""An exception's last line, or an error as programs print it, behind the prefix of a rank."""
LONGEST = 500
LEFT_OUT = "preload.jsonl"
RESTARTS = "restarts.jsonl"
LONGEST = 1 << 16
"""Characters of an exception: the missing keys of a checkpoint may be megabytes, and a search in them half a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    run_id: str
    code: int
    """torchrun's exit code, or that of the worker in its error file if the launcher kept no line."""
    time: float
    """Of the end, seconds since the epoch."""
    failures: tuple[Failure, ...] = ()
    """First failure first; torchrun counts the workers that it ended itself among them."""
    halted: bool = False
    """This node had been told to end before any of its workers failed."""
    finished: bool = False
    """All its workers had ended with 0 before that."""
    message: str = ""
    """The first failing worker's exception, "" if it left none."""
    traceback: str = ""

    @property
    def failed(self) -> bool:
        """A worker of this node, or torchrun, failed by itself."""
        return bool(self.message) or (self.code != 0 and not self.halted)

    @property
    def first_error(self) -> str:
        """One line; "" for none."""
        if self.message or not self.failed:
            return self.message.partition("\n")[0]
        return ending(self.failures[0]) if self.failures else ending(Failure(rank=-1, exitcode=self.code))


def ending(failure: Failure) -> str:
    """How a worker ended that left no exception."""
    who = f"rank {failure.rank}" if failure.rank >= 0 else "torchrun"
    code = failure.exitcode
    if code >= 0:
        return f"{who} ended with exit code {code}, without an exception"
    return f"{who} was ended by {signal.Signals(-code).name if -code in {*signal.Signals} else f'signal {-code}'}"


def end_of_log(log: str) -> str:
    return "\n".join(log.splitlines()[-LAST_WORDS:])


def last_error(log: str) -> str:
    """The last error that a log tells of, "" for none: some scripts print theirs and end with 1, as those of hydra."""
    return next(reversed(ERROR.findall(end_of_log(log))), "")[:LONGEST]


def may_speak(exitcode: int) -> bool:
    """A signal comes without a word, but for an abort: what stands in the log then was said by a healthy process."""
    return exitcode > 0 or exitcode == -signal.SIGABRT


def keep_round(plan: Plan, run_id: str, outcome: Outcome) -> None:
    """Adds a line to this node's history; best effort, since a full disk must not end a job that could go on."""
    fields = {"run_id": run_id, "time": time.time(), **asdict(outcome)}
    line = json.dumps(redact_data(fields, plan_secrets(plan, os.environ)))
    with contextlib.suppress(OSError), open(plan.log_dir / ROUNDS, "a", encoding="utf-8", opener=private) as file:
        file.write(line + "\n")


def keep_left_out(plan: Plan, module: str, why: str) -> None:
    """A module of PRELOAD that could not be loaded; best effort."""
    _keep(plan.log_dir / LEFT_OUT, {"module": module, "why": why})


def keep_restart(plan: Plan, run_id: str, parts: Mapping[str, float]) -> None:
    """How long each part of a restart took; best effort."""
    _keep(plan.log_dir / RESTARTS, {"run_id": run_id, "parts": dict(parts)})


def forget_restarts(plan: Plan) -> None:
    """Of an earlier job of this run. Raises OSError."""
    (plan.log_dir / RESTARTS).unlink(missing_ok=True)


def _keep(file: Path, fields: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError), open(file, "a", encoding="utf-8", opener=private) as stream:
        stream.write(json.dumps({"time": time.time(), **fields}) + "\n")


def read_restarts(folder: Path, started: float = 0.0) -> tuple[Mapping[str, float], ...]:
    """The parts of each restart since `started`, oldest first. Never raises OSError."""
    lines = [line for line in _lines(folder / RESTARTS) if line.get("time", 0) >= started]
    return tuple(line["parts"] for line in lines if isinstance(line.get("parts"), dict))


def restart_in_words(parts: Mapping[str, float]) -> str:
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    return f"restarted in {sum(parts.values()):.2f} s: {told}"


def read_left_out(folder: Path, started: float) -> tuple[str, ...]:
    """`module: why` of each that `keep_left_out` was told since `started`."""
    lines = [line for line in _lines(folder / LEFT_OUT) if line.get("time", 0) >= started]
    return tuple(f"{line['module']}: {line['why']}" for line in lines if {"module", "why"} <= line.keys())


def private(path: str, flags: int) -> int:
    """Opens a file that only its owner may read: exceptions quote what nobody has foreseen."""
    return os.open(path, flags, 0o600)


def read_rounds(folder: Path, started: float) -> tuple[RoundRecord, ...]:
    """Those that ended after `started`, oldest first: the lines of `keep_round` with the exceptions that torch's error
    files hold, and error files without a line. Never raises OSError."""
    found = {each.run_id: each for each in _from_error_files(folder)}
    for kept in _from_lines(folder):
        copied = found.get(kept["run_id"])
        found[kept["run_id"]] = _complete(kept, copied, folder)
    return tuple(sorted((each for each in found.values() if each.time >= started - 1), key=lambda each: each.time))


def _from_lines(folder: Path) -> Iterator[dict[str, Any]]:
    for fields in _lines(folder / ROUNDS):
        with contextlib.suppress(KeyError, TypeError):
            fields["failures"] = tuple(Failure(**failure) for failure in fields["failures"])
            RoundRecord(**fields)
            yield fields


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            # A line may be torn: the machine stopped, or the disk is full.
            with contextlib.suppress(ValueError):
                fields = json.loads(line)
                if isinstance(fields, dict):
                    yield fields


def _complete(kept: Mapping[str, Any], copied: RoundRecord | None, folder: Path) -> RoundRecord:
    first = next(iter(kept["failures"]), None)
    told = copied
    if first and first.local_rank >= 0:
        # torchrun copies the error of the earliest second, which may be another worker's.
        paths = folder.glob(f"{glob.escape(kept['run_id'])}_*/attempt_0/{first.local_rank}/error.json")
        own = next((each for path in paths if (each := read_error_file(path, kept["run_id"]))), None)
        same = copied is not None and bool(first.text) and copied.message.startswith(first.text)
        told = own or (copied if same else None)
    message = told.message if told else first.text if first else ""
    return RoundRecord(**{**kept, "message": message, "traceback": told.traceback if told else ""})


def _from_error_files(folder: Path) -> list[RoundRecord]:
    files = folder.glob("*.error.json")
    return [each for file in files if (each := read_error_file(file, file.name.removesuffix(".error.json")))]


def read_error_file(file: Path, run_id: str) -> RoundRecord | None:
    """An error file as torch's ErrorHandler and dump_error_file write it (elastic/multiprocessing/errors, torch
    2.13)."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))["message"]
        extra = fields["extraInfo"]
        return RoundRecord(
            run_id=run_id,
            message=str(fields["message"])[:LONGEST],
            traceback=str(extra.get("py_callstack", ""))[:LONGEST],
            code=int(fields.get("errorCode", 1)),
            time=float(extra.get("timestamp", file.stat().st_mtime)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
