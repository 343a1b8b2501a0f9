"""`report`: prints what went wrong on this node, or packs it into one archive for a colleague, secrets removed."""

import argparse
import io
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from app.cli.explain import to_lines
from app.config.errors import UserError
from app.config.options import Parser
from app.config.redaction import redact, settings_secrets
from app.config.settings import read_settings
from app.plan import Draft, draft, probe_for
from app.report.history import read_restarts, restart_in_words
from app.report.node_report import READ_BYTES, stored

TEXTS = ("report/*/report.*", "report/*/stalls/*.json", "logs/*/*.error.json", "logs/*/rounds.jsonl", "logs/*/*/*/*/*")
RECORDS = "logs/*/flight_recorder_rank_*"
LARGEST_RECORD = 16 << 20
SHOWN = 10
"""Restarts of a node, of a job that has not failed."""
CLOCKS_DIFFER = 5.0
"""Seconds, of a file server's clock and this node's."""


def main(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path | None) -> int:
    """0 when there was a report to print or pack. Raises UserError otherwise."""
    wanted = options(arguments)
    settings = read_settings(environ, env_file)
    found = draft(settings, probe_for(settings))
    run_dir = found.run_dir
    secrets = settings_secrets(settings)
    try:
        if not wanted.bundle:
            print(redact(reports(run_dir), secrets))
            return 0
        packed = bundle(run_dir, found, secrets)
    except OSError as error:
        raise UserError(f"{error.filename or run_dir} cannot be read: {error.strerror}.") from None
    if wanted.bundle == "-":
        sys.stdout.buffer.write(packed)
        return 0
    try:
        Path(wanted.bundle).write_bytes(packed)
    except OSError as error:
        raise UserError(
            f"{wanted.bundle} cannot be written: {error.strerror}. `--bundle - > FILE` writes outside."
        ) from None
    print(f"{wanted.bundle}: {len(packed) / 1e6:.1f} MB")
    return 0


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """`bundle`: a file, `-` for standard output, None to print."""
    parser = Parser(prog="report", description="What went wrong on this node, last time.")
    parser.add_argument("--bundle", metavar="FILE", help="write one .tar.gz, secrets removed; - is standard output")
    return parser.read(arguments)


def reports(run_dir: Path) -> str:
    """The reports of all nodes whose folder this is, or how their last restarts went. Raises OSError, and UserError
    where there is neither."""
    texts = list[str]()
    for folder in stored(run_dir):
        report = folder / "report.txt"
        texts.append(report.read_text(encoding="utf-8").rstrip())
        rounds = [each.stat().st_mtime for each in (run_dir / "logs" / folder.name).glob("*/attempt_0")]
        # A job that ends well removes the report.
        if (last := max(rounds, default=0.0)) > report.stat().st_mtime + CLOCKS_DIFFER:
            began = datetime.fromtimestamp(last, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            texts[-1] += f"\nsince then: a round began here at {began} that runs still, was stopped, or was killed"
    for logs in [] if texts else sorted((run_dir / "logs").glob("node*")):
        texts += [f"{logs.name}: {restart_in_words(parts)}" for parts in read_restarts(logs)[-SHOWN:]]
    if not texts:
        raise UserError(
            f"{run_dir} holds no report: no job of this run has failed on this node since the last one that ended "
            "well. RUN_NAME names another."
        )
    return "\n\n".join(texts)


def bundle(run_dir: Path, found: Draft, secrets: Iterable[str]) -> bytes:
    """Reports, stacks, flight records, the ends of all logs, and what `explain` says, as a .tar.gz. Raises OSError."""
    known = tuple(secrets)
    content = {file: redact(_end_of(file), known).encode() for file in _files(run_dir, TEXTS)}
    content |= {file: _record(file, known) for file in _files(run_dir, (RECORDS,))}
    plan = to_lines(found).encode(errors="backslashreplace").decode()
    content[run_dir / "explain.txt"] = redact(plan, known).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file, clean in content.items():
            info = tarfile.TarInfo(f"{run_dir.name}/{file.relative_to(run_dir)}")
            info.size = len(clean)
            archive.addfile(info, io.BytesIO(clean))
    return buffer.getvalue()


def _files(run_dir: Path, patterns: Iterable[str]) -> list[Path]:
    """Files of this folder: what links lead to is not the run's, and may be anybody's."""
    found = sorted(file for pattern in patterns for file in run_dir.glob(pattern))
    return [file for file in found if file.is_file() and not _linked(file, run_dir)]


def _linked(file: Path, run_dir: Path) -> bool:
    inner = file.relative_to(run_dir)
    return any((run_dir / part).is_symlink() for part in (inner, *inner.parents[:-1]))


def _end_of(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            start = max(0, file.stat().st_size - READ_BYTES)
            stream.seek(start)
            content = stream.read()
            # Half a line may be half a secret.
            whole = content.partition(b"\n")[2] if start else content
            return (whole or content).decode("utf-8", errors="replace")
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _record(file: Path, secrets: Sequence[str]) -> bytes:
    """A flight record for torchfrtrace: pickled names, shapes and stack frames, no values. The known secrets are
    blotted out in their length, which leaves a pickle readable."""
    try:
        content = file.read_bytes() if file.stat().st_size <= LARGEST_RECORD else b"left out: larger than 16 MiB"
    except OSError as error:
        content = f"cannot be read: {error.strerror}".encode()
    for secret in sorted(secrets, key=len, reverse=True):
        raw = secret.encode(errors="surrogateescape")
        content = content.replace(raw, b"*" * len(raw))
    return content
