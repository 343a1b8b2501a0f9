"""Build the project's image once with an engine of its own, and hand it to the nodes' engines without copying it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.testbed.base import base_image
from tests.testbed.engine import Engine, remove_cgroups
from tests.testbed.engines import Tools
from tests.testbed.shell import PROJECT, cache_folder, locked, run, say

IMAGE = "torchrun-compose:cpu"
BUILDER = "trc-builder"
# What the Dockerfile copies: an edit of anything else needs no build.
INPUTS = ("Dockerfile", ".dockerignore", "entrypoint.py", "app", "requirements")


@contextlib.contextmanager
def builder(tools: Tools) -> Iterator[Engine]:
    """A running engine in the machine's own network whose image store and build cache last."""
    home = Path("/run") / BUILDER
    shutil.rmtree(home, ignore_errors=True)
    engine = Engine(name=BUILDER, tools=tools, home=home, data=store(tools), netns=None)
    engine.launch()
    try:
        engine.ready()
        yield engine
    finally:
        engine.stop()
        remove_cgroups(BUILDER)
        shutil.rmtree(home, ignore_errors=True)


def store(tools: Tools) -> Path:
    """Data root of the engine that builds; generations of Docker do not share one."""
    return cache_folder("builder", tools.prefix.name if tools.prefix else "installed")


@contextlib.contextmanager
def store_lock(tools: Tools) -> Iterator[None]:
    with locked(store(tools).with_suffix(".lock"), what="the image store"):
        yield


def ensure_image(tools: Tools) -> str:
    """The image's tag, after a build if an input changed since the last one."""
    with store_lock(tools):
        stamp = store(tools) / "built"
        wanted = fingerprint()
        if not stamp.exists() or stamp.read_text() != wanted:
            with builder(tools) as engine:
                build(engine)
            stamp.write_text(wanted)
    return IMAGE


def build(engine: Engine, *, progress: str = "quiet", project: Path = PROJECT) -> str:
    """`docker buildx build` of the real Dockerfile; the build's output."""
    base = base_image(engine.tools, engine.docker_host)
    say(f"building {IMAGE} on {base}")
    proxies = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "no_proxy")]
    command = ["docker", "buildx", "build", f"--progress={progress}", "--network=host", f"--tag={IMAGE}"]
    command += [f"--build-arg=BASE_IMAGE={base}", *(f"--build-arg={name}={os.environ[name]}" for name in proxies)]
    command += [f"--build-context=wheels={wheelhouse()}", str(project)]
    output = run(command, env=engine.environment, timeout=1800)
    run(["docker", "image", "prune", "--force"], env=engine.environment)
    return output


def wheelhouse() -> Path:
    """The folder with wheels that this machine's pip is told of, else the project's."""
    for folder in os.environ.get("PIP_FIND_LINKS", "").split():
        if Path(folder).is_dir():
            return Path(folder)
    return PROJECT / "wheels"


def fingerprint() -> str:
    """A digest of everything that decides what the image holds."""
    digest = hashlib.sha256(f"{os.environ.get('BASE_IMAGE', '')}\n{wheelhouse()}\n".encode())
    for name in INPUTS:
        top = PROJECT / name
        for file in sorted(top.rglob("*") if top.is_dir() else [top]):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(PROJECT)} {file.stat().st_mode:o}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def clone_store(tools: Tools, data: Path) -> None:
    """Give an engine that does not run yet all images of the store, as hard links: faster than a save and load.

    Engines never write into an image's layers, they only remove them; a removed link leaves the store's as it is.
    """
    source = store(tools)
    layers = [path.read_text() for path in source.glob("image/overlay2/layerdb/sha256/*/cache-id")]
    (data / "overlay2").mkdir(parents=True)
    run(["cp", "-a", source / "image", data / "image"])
    run(["cp", "-a", source / "overlay2" / "l", data / "overlay2" / "l"])
    run(["cp", "-al", *(source / "overlay2" / layer for layer in layers), data / "overlay2"])
