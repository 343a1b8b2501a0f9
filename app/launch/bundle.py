"""`report`: prints what went wrong on this node, or packs it into one archive for a colleague, secrets removed."""

import argparse
import io
import re
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from app.launch.errors import UserError
from app.launch.explain import to_lines
from app.launch.plan import Draft, draft, probe_for
from app.launch.report import READ_BYTES, stored
from app.launch.settings import Settings, read_settings

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE|CREDENTIAL|AUTH", re.IGNORECASE)
SHORTEST_SECRET = 6
"""Characters: shorter values ("1", "true") would blot out half of every log."""
PATTERNS = (
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"(?i)(?<=bearer )[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[abp]-|AKIA|ASIA)[A-Za-z0-9_-]{12,}"),
    re.compile(
        r"(?i)(?<![A-Za-z])(?:[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIALS?))"
        r"[\"']?\s*[=:]\s*[\"']?(?P<secret>[^\s\"',;}]{6,})"
    ),
)
"""What looks like a secret wherever it stands: user and password in an address, known forms of keys, NAME=value."""
REMOVED = "[removed]"


def main(arguments: Sequence[str], environ: Mapping[str, str], env_file: Path | None) -> int:
    """0 when there was a report to print or pack. Raises UserError otherwise."""
    wanted = options(arguments)
    settings = read_settings(environ, env_file)
    found = draft(settings, probe_for(settings))
    run_dir = Path(next(each.value for each in found.decisions if each.name == "RUN_DIR"))
    folders = stored(run_dir)
    if not folders and not wanted.bundle:
        raise UserError(
            f"{run_dir} holds no report: no job of this run has failed on this node. RUN_NAME names another."
        )
    if not wanted.bundle:
        print("\n\n".join((folder / "report.txt").read_text(encoding="utf-8").rstrip() for folder in folders))
        return 0
    packed = bundle(run_dir, found, secrets_of(settings, found))
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
    parser = argparse.ArgumentParser(prog="report", description="What went wrong on this node, last time.")
    parser.add_argument("--bundle", metavar="FILE", help="write one .tar.gz, secrets removed; - is standard output")
    return parser.parse_args(arguments)


def bundle(run_dir: Path, found: Draft, secrets: Iterable[str]) -> bytes:
    """Reports, the ends of all logs, and what `explain` says, as a .tar.gz."""
    known = tuple(secrets)
    files = [*run_dir.glob("report/*/report.*"), *run_dir.glob("logs/*.error.json"), *run_dir.glob("logs/*/*/*/*")]
    content = {str(file.relative_to(run_dir)): _end_of(file) for file in sorted(files) if file.is_file()}
    content["explain.txt"] = to_lines(found).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, raw in content.items():
            clean = redact(raw.decode("utf-8", errors="replace"), known).encode()
            info = tarfile.TarInfo(f"{run_dir.name}/{name}")
            info.size = len(clean)
            archive.addfile(info, io.BytesIO(clean))
    return buffer.getvalue()


def _end_of(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - READ_BYTES))
            return stream.read()
    except OSError as error:
        return f"cannot be read: {error.strerror}".encode()


def secrets_of(settings: Settings, found: Draft) -> tuple[str, ...]:
    """Values that must not leave this machine: variables with a telling name, and the cluster token."""
    values = [value.text for name, value in settings.values.items() if SECRET_NAME.search(name)]
    token = settings.text("CLUSTER_TOKEN_FILE")
    paths = {token, *(str(found.plan.token_file) for _ in [0] if found.plan and found.plan.token_file)}
    for path in filter(None, paths):
        try:
            values.append(Path(path).read_text(encoding="utf-8", errors="replace").strip())
        except OSError:
            continue
    # A path to a secret is none, and explains much.
    return tuple({value for value in values if len(value) >= SHORTEST_SECRET and value not in paths})


def redact(content: str, secrets: Iterable[str]) -> str:
    """`content` without the `secrets`, longest first, and without what looks like one."""
    for secret in sorted(secrets, key=len, reverse=True):
        content = content.replace(secret, REMOVED)
    for pattern in PATTERNS:
        content = pattern.sub(_blot, content)
    return content


def _blot(found: re.Match[str]) -> str:
    secret = found.groupdict().get("secret")
    return REMOVED if secret is None else found[0].replace(secret, REMOVED)
