"""The trainer's image on every host without a registry: made in one place, sent where it differs, without the layers
that a host has already."""

import hashlib
import json
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from app.config.console import say
from app.config.errors import UserError, printable
from app.fleet.hosts import Desk, Host
from app.fleet.remote import HERE, Result, at_once, complaints, everywhere, run
from app.fleet.stack import compose

# Of its content: image ids differ between Docker's two kinds of image stores for one and the same image.
CONTENT = (
    "{{.Architecture}} {{json .RootFS.Layers}} {{json .Config.Env}} {{json .Config.Entrypoint}} {{json .Config.Cmd}} "
    '{{json .Config.User}} {{index .Config.Labels "org.opencontainers.image.revision"}}'
)
LAYERS = "{{json .RootFS.Layers}}"
BUILT_FROM = ("Dockerfile", "entrypoint.py", "app", "requirements")
TRANSFER = 7200.0
"""Seconds for an image on a slow line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one Docker engine has: the image, and the layers of all its images."""

    arch: str = ""
    """"" where there is no Docker."""
    content: str = ""
    """What the image is; "" if it is not there."""
    chains: tuple[tuple[str, ...], ...] = ()
    """The layers of every image, from the lowest on."""

    @property
    def revision(self) -> str:
        return self.content.rpartition(" ")[2]

    @property
    def kind(self) -> str:
        """Of which architecture the image is."""
        return self.content.partition(" ")[0]

    @property
    def layers(self) -> tuple[str, ...]:
        """Those of the image itself."""
        return tuple(json.loads(self.content.split(" ", 2)[1])) if self.content else ()

    def lacks(self, layers: Sequence[str]) -> int:
        """How many layers of an image are here: an engine knows a layer only on top of the same ones."""
        pairs = (takewhile(lambda pair: pair[0] == pair[1], zip(layers, chain, strict=False)) for chain in self.chains)
        return len(layers) - max((len(list(same)) for same in pairs), default=0)


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
    return Held(arch=arch.strip(), content=content.strip(), chains=tuple(found))


def source_digest(project: Path) -> str:
    """What the image is built from, in one word: its label says from what it was built."""
    digest = hashlib.sha256()
    for part in BUILT_FROM:
        path = project / part
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(project)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


async def bring_image(desk: Desk, where: str, *, build: bool) -> dict[Host, str]:
    """Every host of `desk` gets the image; why it failed by host."""
    began, name = time.monotonic(), image_name(desk)
    results = await everywhere(desk, question(name))
    failed = complaints(results)
    held = {each.host: answer(each.text) for each in results if not each.failure}
    if not held:
        return failed
    held[HERE] = answer((await run(HERE, question(name))).text)
    source = choose(where, held)
    wanted = "" if desk.settings.text("IMAGE") and not build else source_digest(desk.project)
    if wanted and held[source].revision != wanted:
        await _build(desk, source, name, wanted)
        held[source] = answer((await run(source, question(name))).text)
    state = held[source]
    if not state.content:
        say("the image is on no host: each pulls it")
        pull = ("pull", "--quiet", "trainer")
        results = await everywhere(desk, lambda host: compose(desk, host, *pull), what="the image", deadline=TRANSFER)
        return failed | complaints(results)
    behind: dict[int, list[Host]] = {}
    for host in (host for host in held if host != HERE):
        if held[host].arch != state.kind:
            failed[host] = (
                f"{host.name} is {held[host].arch} and the image is {state.kind}. Build it on a machine of that kind: "
                f"`torchrun-compose --on {host.name} push --image {host.name}`."
            )
            say(failed[host])
        elif held[host].content != state.content:
            behind.setdefault(held[host].lacks(state.layers), []).append(host)
    for count, hosts in behind.items():
        failed |= await _send(name, source, hosts, state.layers, count)
    sent = sum(map(len, behind.values()))
    say(f"image: {name} sent to {sent} of {len(desk.hosts)} hosts in {time.monotonic() - began:.1f} s")
    return failed


def choose(where: str, held: Mapping[Host, Held]) -> Host:
    """Whose engine has or makes the image. Raises UserError for an unknown name."""
    hosts = {host: each for host, each in held.items() if host != HERE}
    if where not in ("auto", "desk"):
        named = [host for host in hosts if where in (host.name, str(host.rank))]
        if not named:
            raise UserError(f"--image {printable(where)}: write desk, none, or one of the hosts.")
        return named[0]
    if where == "desk" or {each.arch for each in hosts.values()} == {held[HERE].arch}:
        return HERE
    return next((host for host, each in hosts.items() if each.content), next(iter(hosts)))


async def _build(desk: Desk, source: Host, name: str, revision: str) -> None:
    """Raises UserError with Docker's last words."""
    say(f"building {name} on {source.name}")
    words = ("build", "--build-arg", f"REVISION={revision}", "trainer")
    there = replace(desk, folder=str(desk.project)) if source == HERE else desk
    (done,) = await at_once({source: run(source, compose(there, source, *words), deadline=TRANSFER)}, "the build")
    if done.failure:
        tail = "\n".join(f"  {line}" for line in done.err.splitlines()[-8:])
        raise UserError(f"The image could not be built on {source.name}:\n{tail or done.failure.message}", 1)


async def _send(name: str, source: Host, hosts: Sequence[Host], layers: Sequence[str], count: int) -> dict[Host, str]:
    """One archive for hosts that lack the last `count` layers; then `docker load`, which tags the image at its end."""
    known = layers[: len(layers) - count]
    with tempfile.TemporaryDirectory(prefix="torchrun-compose-") as folder:
        archive = Path(folder, "image.tar.gz")
        done = await _save(name, source, known, archive)
        if known and (done.code or done.err):
            known = ()
            done = await _save(name, source, known, archive)
        if done.code or done.err:
            raise UserError(f"{name} could not be read from Docker on {source.name}: {done.err}", 1)
        size = archive.stat().st_size / 1e6
        say(f"sending {len(layers) - len(known)} of {len(layers)} layers ({size:.1f} MB) to {_names(hosts)}")
        loads = {host: run(host, "exec docker load --quiet", stdin=archive, deadline=TRANSFER) for host in hosts}
        results = await at_once(loads, "the image")
    refused = [each.host for each in results if each.failure]
    if refused and known:
        # An engine that keeps its layers in another way wants them all.
        return await _send(name, source, refused, layers, len(layers))
    return complaints(results)


async def _save(name: str, source: Host, known: Sequence[str], path: Path) -> Result:
    """`docker save` into a compressed file, without layers that the other side has. Since Docker 25 they are named by
    their digests; in the archive of an older engine tar does not find these names, and complains."""
    names = [f"blobs/sha256/{digest.removeprefix('sha256:')}" for digest in known]
    without = f"| tar --delete -f - {shlex.join(names)} " if names else ""
    with path.open("wb") as file:
        command = f"docker save {shlex.quote(name)} {without}| gzip -1"
        (done,) = await at_once({source: run(source, command, deadline=TRANSFER, sink=file.write)}, "docker save")
    return done


def _names(hosts: Sequence[Host]) -> str:
    return ", ".join(host.name for host in hosts)
