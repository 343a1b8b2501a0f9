"""The trainer's image on every host without a registry: made in one place, sent where it differs, without the layers
that a host has already."""

import asyncio
import gzip
import hashlib
import json
import shlex
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.config.console import say
from app.config.errors import UserError, printable
from app.fleet.hosts import Desk, Host
from app.fleet.remote import at_once, everywhere, run
from app.fleet.stack import compose

# Of its content: image ids differ between Docker's two kinds of image stores for one and the same image.
CONTENT = (
    "{{.Architecture}} {{json .RootFS.Layers}} {{json .Config.Env}} {{json .Config.Entrypoint}} {{json .Config.Cmd}} "
    '{{json .Config.User}} {{index .Config.Labels "org.opencontainers.image.revision"}}'
)
LAYERS = "{{json .RootFS.Layers}}"
BUILT_FROM = ("Dockerfile", "entrypoint.py", "app", "requirements")
SOURCES = (".py", ".toml", ".txt", ".in", "Dockerfile")
TRANSFER = 7200.0
"""Seconds for an image on a slow line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one Docker engine has: the image, and the layers of all its images."""

    docker: bool
    arch: str = ""
    content: str = ""
    """What the image is; "" if it is not there."""
    chains: tuple[tuple[str, ...], ...] = ()
    """The layers of every image, from the lowest on."""

    @property
    def revision(self) -> str:
        return self.content.rpartition(" ")[2]

    @property
    def layers(self) -> tuple[str, ...]:
        """Those of the image itself."""
        return tuple(json.loads(self.content.split(" ", 2)[1])) if self.content else ()

    def lacks(self, layers: Sequence[str]) -> int:
        """How many layers of an image are here: an engine knows a layer only on top of the same ones."""
        same = [sum(1 for _ in _common(layers, chain)) for chain in self.chains]
        return len(layers) - max(same, default=0)


def _common(one: Sequence[str], other: Sequence[str]) -> Sequence[str]:
    found = []
    for first, second in zip(one, other, strict=False):
        if first != second:
            break
        found.append(first)
    return found


def image_name(desk: Desk) -> str:
    """The trainer's image, as compose.yaml names it."""
    hardware = desk.settings.hardware
    return desk.settings.text("IMAGE") or f"torchrun-compose:{hardware.value if hardware else 'cpu'}"


def question(name: str) -> str:
    """Lines of sh that tell what an engine has."""
    return "\n".join(
        [
            "docker version --format '{{.Server.Arch}}' || exit",
            f"docker image inspect --format {shlex.quote(CONTENT)} {shlex.quote(name)} 2>/dev/null || echo",
            f"docker image inspect --format {shlex.quote(LAYERS)} $(docker image ls --quiet) 2>/dev/null || true",
        ]
    )


def answer(text: str) -> Held:
    arch, _, rest = text.partition("\n")
    content, _, chains = rest.partition("\n")
    found = {tuple(json.loads(line)) for line in chains.splitlines() if line.startswith("[")}
    return Held(docker=bool(arch), arch=arch.strip(), content=content.strip(), chains=tuple(found))


def source_digest(project: Path) -> str:
    """What the image is built from, in one word: its label says from what it was built."""
    digest = hashlib.sha256()
    for part in BUILT_FROM:
        path = project / part
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.name.endswith(SOURCES):
                digest.update(str(file.relative_to(project)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


async def bring_image(desk: Desk, where: str, *, build: bool) -> dict[Host, str]:
    """Every host of `desk` gets the image; why it failed by host."""
    began, name = time.monotonic(), image_name(desk)
    results = await everywhere(desk, question(name), deadline=60)
    failed = {each.host: each.failure.message for each in results if each.failure}
    held = {each.host: answer(each.text) for each in results if not each.failure}
    for text in failed.values():
        say(text)
    if not held:
        return failed
    here = await asyncio.to_thread(_here, name)
    source = choose(where, here, held)
    state = here if source is None else held[source]
    wanted = "" if desk.settings.text("IMAGE") and not build else source_digest(desk.project)
    if wanted and (state.revision != wanted or not state.content):
        say(f"building {name} on {source.name if source else 'this machine'}")
        await _build(desk, source, wanted)
        state = await asyncio.to_thread(_here, name) if source is None else await _ask(source, name)
    if not state.content:
        # Named, and nowhere: a registry's.
        return failed | await _pull(desk)
    apart = {host for host, each in held.items() if each.arch != state.arch}
    for host in apart:
        failed[host] = (
            f"{host.name} is {held[host].arch} and the image is {state.arch}. Build it on a machine of that kind: "
            f"`torchrun-compose --on {host.name} push --image {host.name}`."
        )
        say(failed[host])
    behind = [host for host, each in held.items() if each.content != state.content and host not in apart | {source}]
    if behind:
        failed |= await _send(name, source, state, {host: held[host] for host in behind})
    say(f"image: {name} sent to {len(behind)} of {len(held)} hosts in {time.monotonic() - began:.1f} s")
    return failed


def choose(where: str, here: Held, held: Mapping[Host, Held]) -> Host | None:
    """The host whose engine has or makes the image; None: this machine's. Raises UserError for an unknown name."""
    if where not in ("auto", "desk"):
        named = [host for host in held if where in (host.name, str(host.rank))]
        if not named:
            raise UserError(f"--image {printable(where)}: write desk, none, or one of the hosts.")
        return named[0]
    kinds = {each.arch for each in held.values()}
    if where == "desk" or (here.docker and kinds == {here.arch}):
        return None
    return next((host for host, each in held.items() if each.content), next(iter(held)))


def _here(name: str) -> Held:
    """This machine's own engine, if it has one."""
    done = subprocess.run(["sh", "-c", question(name)], capture_output=True, text=True, check=False, timeout=60)
    return answer(done.stdout) if done.returncode == 0 else Held(docker=False)


async def _ask(host: Host, name: str) -> Held:
    return answer((await run(host, question(name), deadline=60)).text)


async def _build(desk: Desk, source: Host | None, revision: str) -> None:
    """Raises UserError with Docker's last words."""
    words = ["build", "--build-arg", f"REVISION={revision}", "trainer"]
    if source is not None:
        (done,) = await at_once({source: run(source, compose(desk, source, *words), deadline=TRANSFER)}, "the build")
        said = "" if done.code == 0 else done.err
    else:
        own = ["docker", "compose", "--ansi", "never", *words]
        ended = await asyncio.to_thread(
            subprocess.run, own, cwd=desk.project, capture_output=True, text=True, check=False
        )
        said = "" if ended.returncode == 0 else ended.stderr
    if said:
        tail = "\n".join(f"  {printable(line)}" for line in said.splitlines()[-8:])
        raise UserError(f"The image could not be built on {source.name if source else 'this machine'}:\n{tail}", 1)


async def _pull(desk: Desk) -> dict[Host, str]:
    say("the image is on no host: each pulls it")
    words = ("pull", "--quiet", "trainer")
    results = await everywhere(desk, lambda host: compose(desk, host, *words), what=words[0], deadline=TRANSFER)
    failed = {each.host: each.failure.message for each in results if each.failure}
    for text in failed.values():
        say(text)
    return failed


async def _send(name: str, source: Host | None, state: Held, behind: Mapping[Host, Held]) -> dict[Host, str]:
    """One archive for all hosts that lack the same layers; then `docker load`, which tags the image at its end."""
    groups: dict[int, list[Host]] = {}
    for host, held in behind.items():
        groups.setdefault(held.lacks(state.layers), []).append(host)
    failed = dict[Host, str]()
    for count, hosts in groups.items():
        known = state.layers[: len(state.layers) - count]
        refused = await _send_to(name, source, hosts, known, f"{count} of {len(state.layers)} layers")
        if refused and known:
            # An engine that keeps its layers in another way wants them all.
            refused = await _send_to(name, source, list(refused), (), f"all {len(state.layers)} layers")
        failed |= refused
    for text in failed.values():
        say(text)
    return failed


async def _send_to(
    name: str, source: Host | None, hosts: Sequence[Host], known: Sequence[str], what: str
) -> dict[Host, str]:
    with tempfile.TemporaryDirectory(prefix="torchrun-compose-") as folder:
        archive = Path(folder, "image.tar.gz")
        if source is None:
            await asyncio.to_thread(save, name, known, archive)
        else:
            await _save_there(name, source, known, archive)
        say(f"sending {what} ({archive.stat().st_size / 1e6:.1f} MB) to {', '.join(host.name for host in hosts)}")
        load = "exec docker load --quiet"
        loads = {host: run(host, load, stdin=archive, deadline=TRANSFER) for host in hosts}
        done = await at_once(loads, "the image")
    return {each.host: each.failure.message for each in done if each.failure}


def left_out(known: Sequence[str]) -> list[str]:
    """The files of these layers in an archive of `docker save`. Since Docker 25 they are named by their digests; the
    archive of an older engine has none of these names, and is sent whole."""
    return [f"blobs/sha256/{digest.removeprefix('sha256:')}" for digest in known]


async def _save_there(name: str, source: Host, known: Sequence[str], path: Path) -> None:
    parts = [f"docker save {shlex.quote(name)}"]
    parts += [f"tar --delete -f - {shlex.join(left_out(known))}"] if known else []
    with path.open("wb") as file:
        done = await run(source, " | ".join([*parts, "gzip -1"]), deadline=TRANSFER, sink=file.write)
    if done.code or done.err:
        raise UserError(f"{name} could not be read from Docker on {source.name}: {done.err or done.failure}", 1)


def save(name: str, known: Sequence[str], path: Path) -> None:
    """`docker save` of this machine's engine into a compressed file, without the layers that the other side has."""
    process = subprocess.Popen(["docker", "save", name], stdout=subprocess.PIPE)
    names = left_out(known)
    with (
        process,
        gzip.open(path, "wb", compresslevel=1) as write,
        tarfile.open(fileobj=process.stdout, mode="r|") as old,
        tarfile.open(fileobj=write, mode="w|") as new,
    ):
        for member in old:
            if member.name not in names:
                new.addfile(member, old.extractfile(member) if member.isreg() else None)
    if process.returncode:
        raise UserError(f"{name} could not be read from this machine's Docker.", 1)
