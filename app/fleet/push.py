"""`push`: the project, its settings, the user's scripts and secrets on every host, and the image; only what changed.

The files travel as one tar archive over ssh: nothing is needed on a host for it, and what it has is compared by size
and time, as rsync does. They lie aside until all are there; then the host itself renames them into place, so that
neither a broken connection nor a desk that is switched off leaves half of them.
"""

import argparse
import asyncio
import io
import secrets
import shlex
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.config.console import say
from app.config.errors import UserError
from app.config.options import Parser
from app.fleet.hosts import Desk, Host
from app.fleet.image import bring_image
from app.fleet.remote import Result, at_once, complaints, contact, everywhere, run
from app.fleet.stack import OUTSIDE

PARTS = ("compose.yaml", "hardware", "Dockerfile", ".dockerignore", "entrypoint.py", "app", "requirements", "secrets")
"""Of the checkout. `.env` and the workspace come from where the settings say; data stays where it is."""
LEFT_OUT = {"__pycache__", ".git", ".venv", ".ipynb_checkpoints", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
NOT_OURS = 3
# Where a push lies aside, and the list of what the last one brought. Its name begins with a dot: compose ignores it.
KEPT = ".desk"
# Files are moved folder by folder: one rename each. Once `commit` is there, whoever comes next ends what was begun.
APPLY = r"""
apply() {
  [ -d .desk/commit ] || return 0
  [ ! -f .desk/commit/gone ] || xargs -0 rm -f -- < .desk/commit/gone
  ( cd .desk/commit/files && find . -type d ) | while IFS= read -r d; do
    [ -d "$d" ] && [ ! -L "$d" ] || { rm -f -- "$d"; mkdir -p -- "$d"; }
    find ".desk/commit/files/$d" -mindepth 1 -maxdepth 1 ! -type d \
      -exec sh -c 'to=$1; shift; mv -f -- "$@" "$to"' sh "$d" {} +
  done
  mv -f .desk/commit/pushed .desk/pushed && rm -rf .desk/commit
}
"""
# First what another push left undone; then what is here: mode, size, time, name. Another push may make .desk at this
# moment, and makes it before all else: whether it is there is asked last.
LIST = (
    APPLY
    + r"""
if [ -d FOLDER ] && [ -n "$(ls -A FOLDER)" ] && [ ! -d FOLDER/.desk ]; then exit 3; fi
mkdir -p FOLDER && chmod 755 FOLDER && cd FOLDER && mkdir -p -m 700 .desk || exit 1
exec 9> .desk/lock && flock 9 && apply
find .desk -maxdepth 1 -name 'new.*' -mmin +1440 -exec rm -rf {} +
for part in PARTS; do [ ! -e "$part" ] || find "$part" -type f -exec stat -c '%a %s %Y %n' {} +; done
echo
cat .desk/pushed 2>/dev/null || true
"""
)
RECEIVE = (
    APPLY
    + r"""
cd FOLDER || exit 1
new=$(mktemp -d .desk/new.XXXXXX) || exit 1
tar -xpzf - -C "$new" && [ "$(cat "$new/whole")" = TOKEN ] || { rm -rf "$new"; exit 1; }
trap '' HUP INT TERM PIPE
exec 9> .desk/lock && flock 9 || exit 1
apply && mkdir -p "$new/files" && mv "$new" .desk/commit && apply || exit 1
mkdir -p data runs wheels workspace secrets
[ "$(id -u)" != 0 ] || chown -R RUN_AS workspace secrets
"""
)


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of the desk as it will be on the hosts."""

    source: Path
    mode: int
    size: int
    time: int

    @property
    def stated(self) -> tuple[int, int, int]:
        return self.mode, self.size, self.time


def push(desk: Desk, arguments: Sequence[str]) -> int:
    """0 when every host has all of it."""
    wanted = options("push", arguments)
    return int(bool(asyncio.run(bring(desk, wanted.image, build=wanted.build))))


def options(name: str, arguments: Sequence[str], *, attach: bool = False) -> argparse.Namespace:
    """`image`, `build`, and for `up` `attach`."""
    what = "Project, settings, scripts, secrets and image on every host, as far as they changed"
    parser = Parser(prog=name, description=f"{what}; then starts them all." if attach else f"{what}.")
    if attach:
        parser.add_argument("--attach", action="store_true", help="stay and show the logs; Ctrl-C only detaches")
    parser.add_argument(
        "--image",
        default="auto",
        metavar="WHERE",
        help=(
            "where the image is made or is already: desk, a host, or none (leave the hosts' images alone); "
            "default: the desk if it has Docker and is of the hosts' kind, else the first host"
        ),
    )
    parser.add_argument("--build", action="store_true", help="build it anew, also where IMAGE names one")
    return parser.read(arguments)


async def bring(desk: Desk, image: str = "auto", *, build: bool = False) -> dict[Host, str]:
    """Pushes everything to the hosts that answer; returns why it failed by host. Says how long each part took."""
    failed = complaints(await contact(desk))
    here = desk.only([each.name for each in desk.hosts if each not in failed])
    if not here.hosts:
        raise UserError("No host answers.", 1)
    began = time.monotonic()
    outcomes = await push_files(here)
    for host, outcome in outcomes.items():
        if isinstance(outcome, str):
            failed[host] = outcome
            say(outcome)
    sent = sum(outcome for outcome in outcomes.values() if isinstance(outcome, int))
    say(f"files: {sent / 1e6:.1f} MB sent to {len(outcomes)} hosts in {time.monotonic() - began:.1f} s")
    here = desk.only([each.name for each in desk.hosts if each not in failed])
    if here.hosts and image != "none":
        failed |= await bring_image(here, image, build=build)
    return failed


async def push_files(desk: Desk) -> dict[Host, int | str]:
    """Bytes that were sent to each host, or why they were not."""
    files = dict(local_files(desk))
    fill = {"FOLDER": desk.folder, "PARTS": shlex.join([".env", "workspace", *PARTS])}
    listed = await everywhere(desk, filled(LIST, **fill), deadline=120, limit=256 << 20)
    with tempfile.TemporaryDirectory(prefix="torchrun-compose-") as folder:
        packed = Archives(files, Path(folder))
        sends = {each.host: _send(desk, each, packed) for each in listed}
        return dict(zip(desk.hosts, await at_once(sends, "files"), strict=True))


class Archives:
    """One archive for all hosts that lack the same."""

    def __init__(self, files: Mapping[str, File], folder: Path) -> None:
        self.files, self.token = files, secrets.token_hex(8)
        self._folder, self._made = folder, dict[tuple[tuple[str, ...], tuple[str, ...]], asyncio.Future[Path]]()

    async def archive(self, changed: Sequence[str], gone: Sequence[str]) -> Path:
        key = (tuple(changed), tuple(gone))
        if key not in self._made:
            path = self._folder / str(len(self._made))
            chosen = {name: self.files[name] for name in changed}
            work = asyncio.to_thread(pack, path, chosen, gone, sorted(self.files), self.token)
            self._made[key] = asyncio.ensure_future(work)
        return await self._made[key]


async def _send(desk: Desk, listed: Result, archives: Archives) -> int | str:
    host = listed.host
    if listed.code == NOT_OURS:
        return f"{host.name} has a folder {desk.folder} that push did not make. Move it away there, or set HOST_DIR."
    if listed.failure:
        return listed.failure.message
    there, before = parse_listing(listed.out.decode("utf-8", "surrogateescape"))
    changed = [name for name, file in archives.files.items() if there.get(name) != file.stated]
    gone = sorted(before - archives.files.keys())
    if not changed and not gone:
        return 0
    packed = await archives.archive(changed, gone)
    fill = {"FOLDER": desk.folder, "TOKEN": archives.token, "RUN_AS": desk.settings.text("RUN_AS") or "1000:1000"}
    done = await run(host, filled(RECEIVE, **fill), stdin=packed, deadline=3600)
    return done.failure.message if done.failure else packed.stat().st_size


def filled(script: str, **values: str) -> str:
    """The script with its words in capitals replaced; PARTS is a list of words already."""
    for name, value in values.items():
        script = script.replace(name, value if name == "PARTS" else shlex.quote(value))
    return script


def parse_listing(text: str) -> tuple[dict[str, tuple[int, int, int]], set[str]]:
    """What a host has, and what the last push brought: mode, size and time by name, and names."""
    there, _, before = text.partition("\n\n") if not text.startswith("\n") else ("", "", text[1:])
    found = {}
    for line in there.splitlines():
        mode, size, changed, name = line.split(" ", 3)
        found[name] = (int(mode, 8), int(size), int(changed))
    return found, {name for name in before.split("\0") if name}


def local_files(desk: Desk) -> Iterator[tuple[str, File]]:
    """What belongs on a host, by its name there. Raises UserError for what cannot be read."""
    settings, project = desk.settings, desk.project
    env = project / (settings.text("ENV_FILE") or ".env")
    sources = {".env": env, "workspace": project / (settings.text("WORKSPACE") or "workspace")}
    sources |= {part: project / part for part in PARTS}
    if token := settings.text("CLUSTER_TOKEN_FILE"):
        sources[OUTSIDE["CLUSTER_TOKEN_FILE"].removeprefix("./")] = project / token
    for name, source in sources.items():
        yield from _walk(name, source)


def _walk(name: str, source: Path) -> Iterator[tuple[str, File]]:
    try:
        if source.is_dir() and not source.is_symlink():
            for entry in sorted(source.iterdir()):
                if entry.name not in LEFT_OUT:
                    yield from _walk(f"{name}/{entry.name}", entry)
        elif source.is_symlink() or source.is_file():
            state = source.lstat()
            if "\n" in name:
                raise UserError(f"{name!r} has a line end in its name.")
            size = -1 if source.is_symlink() else state.st_size
            yield name, File(source=source, mode=state.st_mode & 0o7777, size=size, time=int(state.st_mtime))
    except OSError as error:
        raise UserError(f"{error.filename or source} cannot be read: {error.strerror}.") from None


def pack(path: Path, files: Mapping[str, File], gone: Sequence[str], names: Sequence[str], token: str) -> Path:
    """The archive for a host: files, names to remove, the new list, and last a mark that it is whole."""
    with tarfile.open(path, mode="w:gz", compresslevel=3, format=tarfile.PAX_FORMAT) as archive:
        for name, file in files.items():
            info = archive.gettarinfo(file.source, f"files/{name}")
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            # Whole seconds, as they are compared.
            info.mtime = file.time
            with file.source.open("rb") if info.isreg() else io.BytesIO() as content:
                archive.addfile(info, content)
        texts = {"gone": "\0".join(gone), "pushed": "\0".join(names), "whole": token}
        for name, text in texts.items():
            raw = text.encode("utf-8", "surrogateescape")
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path
