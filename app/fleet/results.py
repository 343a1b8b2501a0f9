"""`report` and `pull`: what the nodes hold, on the desk."""

import asyncio
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from app.config.console import say
from app.config.errors import UserError, printable
from app.config.options import Parser
from app.fleet.hosts import Desk, Host
from app.fleet.remote import Result, at_once, complaints, contact, everywhere, run
from app.fleet.stack import run_trainer

BUNDLE = 300.0
PULL = 24 * 3600.0
KINDS = {"checkpoints": ("checkpoints",), "logs": ("logs", "report"), "metrics": ("*.jsonl", "tensorboard", "events*")}
"""What of a run's folder each word means."""
# Runs in the trainer's image: reads what the desk has, {path: bytes that are there}, and sends the rest of each file.
SENDER = r"""
import json, os, sys
from pathlib import Path
wanted = json.load(sys.stdin)
run = Path(os.environ.get("RUN_DIR") or Path(os.environ["RUNS_ROOT"], os.environ.get("RUN_NAME") or "default"))
out, patterns = sys.stdout.buffer, wanted["patterns"]
places = [(run / name, name) for pattern in patterns for name in sorted({each.name for each in run.glob(pattern)})]
if "checkpoints" in patterns and os.environ.get("CHECKPOINT_DIR"):
    places = [(Path(os.environ["CHECKPOINT_DIR"]), "checkpoints")]
for top, name in places:
    for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
        try:
            if file.is_symlink() or not file.is_file():
                continue
            path = str(Path(name, file.relative_to(top)))
            with file.open("rb") as source:
                state = os.fstat(source.fileno())
                mark = f"{state.st_size}-{state.st_mtime_ns}"
                have = wanted["have"].get(path, ["", 0])
                start = have[1] if have[0] == mark else 0
                if start == state.st_size and have[0] == mark:
                    continue
                source.seek(start)
                head = {"path": path, "size": state.st_size, "mtime": state.st_mtime_ns, "start": start}
                out.write(json.dumps(head).encode() + b"\n")
                left = state.st_size - start
                while left:
                    data = source.read(min(left, 1 << 20))
                    if not data:
                        sys.exit(f"{path} became shorter while it was read")
                    out.write(data)
                    left -= len(data)
        except FileNotFoundError:
            continue
"""


def report(desk: Desk, arguments: Sequence[str]) -> int:
    """One archive of all nodes' bundles, and the verdict; 1 where no node has a report."""
    parser = Parser(prog="report", description="What went wrong: every node's report in one archive, secrets removed.")
    parser.add_argument("--to", type=Path, metavar="FILE", help="the archive (report-RUN-TIME.tar.gz)")
    wanted = parser.read(arguments)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = wanted.to or Path(f"report-{desk.settings.run_name.value}-{stamp}.tar.gz")
    results = asyncio.run(
        everywhere(
            desk,
            lambda host: run_trainer(desk, host, "report", "--bundle", "-"),
            what="its report",
            deadline=BUNDLE,
            limit=1 << 30,
        )
    )
    reports: dict[str, dict[str, Any]] = {}
    complaints(results)
    try:
        with tarfile.open(path, "w:gz") as archive:
            for each in results:
                if not each.failure and (found := _add(archive, each)):
                    reports[each.host.name] = found
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
    print("\n".join(verdict(reports)))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, of {len([each for each in results if not each.failure])} hosts")
    return int(not reports)


def _add(archive: tarfile.TarFile, result: Result) -> dict[str, Any] | None:
    """Copies a node's bundle into a folder of its name; its own report.json."""
    newest: dict[str, Any] | None = None
    try:
        with tarfile.open(fileobj=io.BytesIO(result.out), mode="r:gz") as bundle:
            for member in bundle:
                source = bundle.extractfile(member) if member.isreg() and safe(member.name) else None
                if source is None:
                    continue
                content = source.read()
                member.name = f"{result.host.name.replace(':', '_')}/{member.name}"
                archive.addfile(member, io.BytesIO(content))
                if member.name.endswith("/report.json"):
                    found = json.loads(content)
                    if newest is None or found.get("time", 0) > newest.get("time", 0):
                        newest = found
    except (tarfile.TarError, OSError, ValueError) as error:
        say(f"{result.host.name}: its bundle cannot be read: {printable(str(error))}")
    return newest


def verdict(reports: dict[str, dict[str, Any]]) -> list[str]:
    """One verdict of all reports: of the last job, with the cause that a node knows for certain before any other."""
    if not reports:
        return ["no node has a report: no job of this run has failed since the last one that ended well"]
    newest = max(float(each["time"]) for each in reports.values())
    # Nodes of one job write within a minute; an older report is another job's.
    of_last = {name: each for name, each in reports.items() if newest - float(each["time"]) < 60}
    best = max(
        of_last.values(), key=lambda each: (bool(each.get("names_cause")), bool(each.get("cause")), -each["node_rank"])
    )
    lines = [f"verdict: {printable(line)}" for line in str(best["verdict"]).splitlines()]
    for word in ("cause", "fix"):
        lines += [f"{word}: {printable(str(best[word]))}"] if best.get(word) else []
    silent = [name for name in reports if name not in of_last]
    return [*lines, *([f"older reports, of another job: {', '.join(silent)}"] if silent else [])]


def safe(name: str) -> bool:
    """Whether a name that a node sent stays below the folder it is put into."""
    path = PurePosixPath(name)
    return bool(path.parts) and name.isprintable() and not path.is_absolute() and ".." not in path.parts


def pull(desk: Desk, arguments: Sequence[str]) -> int:
    """Copies results here; what is complete is not sent again, and what was cut off goes on where it stopped."""
    parser = Parser(prog="pull", description="Results to this machine; once more goes on where it was interrupted.")
    parser.add_argument("kinds", nargs="*", metavar="|".join(KINDS), help="what (all of them)")
    parser.add_argument("--to", type=Path, default=Path("results"), help="the folder (results)")
    wanted = parser.read(arguments)
    if unknown := [kind for kind in wanted.kinds if kind not in KINDS]:
        parser.error(f"unknown argument {unknown[0]}")
    return asyncio.run(_pull(desk, wanted.kinds or list(KINDS), wanted.to))


async def _pull(desk: Desk, kinds: Sequence[str], to: Path) -> int:
    dead = complaints(await contact(desk))
    alive = [host for host in desk.hosts if host not in dead]
    pulls = {host: _pull_from(desk, host, _of(desk, host, alive, kinds), to) for host in alive}
    results = await at_once(pulls, "results")
    return int(bool(dead) or any(results))


def _of(desk: Desk, host: Host, alive: Sequence[Host], kinds: Sequence[str]) -> list[str]:
    """The patterns to ask this host for. Where checkpoints are brought level one node has them all."""
    mirrored = desk.settings.checkpoints.value == "mirror"
    return [
        pattern
        for kind in kinds
        if kind != "checkpoints" or not mirrored or host == alive[0]
        for pattern in KINDS[kind]
    ]


async def _pull_from(desk: Desk, host: Host, patterns: Sequence[str], to: Path) -> int:
    folder = to / desk.settings.run_name.value / host.name.replace(":", "_")
    began, receiver = time.monotonic(), Receiver(folder)
    if patterns:
        request = json.dumps({"patterns": patterns, "have": present(folder)}).encode()
        words = ("-c", 'exec "$(command -v python3 || command -v python)" -c "$0"', SENDER)
        command = run_trainer(desk, host, *words, entrypoint="sh", options=("--interactive",))
        try:
            done = await run(host, command, stdin=request, deadline=PULL, sink=receiver.feed)
        finally:
            receiver.close()
        if done.failure or receiver.file:
            why = done.failure.message if done.failure else f"{host.name} stopped in the middle of a file."
            say(f"{why} `torchrun-compose pull` again goes on from there.")
            return 1
    took = time.monotonic() - began
    print(f"{folder}: {receiver.files} files, {receiver.received / 1e6:.1f} MB in {took:.1f} s")
    return 0


def present(folder: Path) -> dict[str, tuple[str, int]]:
    """What lies here of an earlier pull: its mark (size and time there), and how many bytes of it are here."""
    found = {}
    for file in folder.rglob("*"):
        if file.is_file():
            state, part = file.stat(), re.fullmatch(r"\.(.+)\.(\d+-\d+)\.part", file.name)
            name, mark = (part[1], part[2]) if part else (file.name, f"{state.st_size}-{state.st_mtime_ns}")
            path = str((file.parent / name).relative_to(folder))
            if part or path not in found:
                found[path] = (mark, state.st_size)
    return found


@dataclass(slots=True)
class Receiver:
    """Writes what a node sends: a line of JSON for each file, then its bytes. A file has its name once it is whole."""

    folder: Path
    files: int = 0
    received: int = 0
    file: IO[bytes] | None = None
    _head: dict[str, Any] = field(default_factory=dict)
    _left: int = 0
    _line: bytes = b""

    def feed(self, data: bytes) -> None:
        """Raises UserError for a name that leads out of the folder, or a disk that is full."""
        try:
            while data:
                data = self._content(data) if self.file else self._header(data)
        except OSError as error:
            raise UserError(f"{error.filename or self.folder} cannot be written: {error.strerror}.", 1) from None

    def _header(self, data: bytes) -> bytes:
        line, end, rest = data.partition(b"\n")
        self._line += line
        if not end:
            return b""
        self._head, self._line = json.loads(self._line), b""
        if not safe(self._head["path"]):
            raise UserError(f"A node sent a file named {printable(self._head['path'])}.", 1)
        part = self._part()
        part.parent.mkdir(parents=True, exist_ok=True)
        # In place of what lies here where it begins anew; O_NOFOLLOW: nothing that was put there is written through.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (0 if self._head["start"] else os.O_TRUNC)
        self.file = os.fdopen(os.open(part, flags, 0o644), "wb")
        self.file.seek(self._head["start"])
        self._left = self._head["size"] - self._head["start"]
        if not self._left:
            self._whole()
        return rest

    def _content(self, data: bytes) -> bytes:
        mine, rest = data[: self._left], data[self._left :]
        if self.file:
            self.file.write(mine)
        self._left -= len(mine)
        self.received += len(mine)
        if not self._left:
            self._whole()
        return rest

    def _part(self) -> Path:
        path = self.folder / str(self._head["path"])
        return path.with_name(f".{path.name}.{self._head['size']}-{self._head['mtime']}.part")

    def _whole(self) -> None:
        self.close()
        part, path = self._part(), self.folder / self._head["path"]
        os.utime(part, ns=(self._head["mtime"], self._head["mtime"]))
        part.replace(path)
        self.files += 1

    def close(self) -> None:
        """What was begun stays, to go on from."""
        if self.file:
            self.file.close()
        self.file = None
