"""Build the project's image once with an engine of its own, and share it with the nodes' engines."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from tests.testbed.base import base_image
from tests.testbed.engine import Engine, remove_cgroups
from tests.testbed.engines import Tools
from tests.testbed.shell import PROJECT, cache_folder, locked, run, say, try_lock

IMAGE = "torchrun-compose:cpu"
# What the Dockerfile copies: an edit of anything else needs no build.
INPUTS = ("Dockerfile", ".dockerignore", "entrypoint.py", "app", "requirements")


@contextlib.contextmanager
def builder(tools: Tools, data: Path) -> Iterator[Engine]:
    """A running engine in the machine's own network whose images and build cache last as long as `data`."""
    # One name per store, so that users of different stores do not meet; short for the sockets below it.
    name = f"trc-{zlib.crc32(str(data).encode()):08x}"
    home = Path("/run") / name
    shutil.rmtree(home, ignore_errors=True)
    engine = Engine(name=name, tools=tools, home=home, data=data, netns=None)
    engine.launch()
    try:
        engine.ready()
        yield engine
    finally:
        engine.stop()
        remove_cgroups(name)
        shutil.rmtree(home, ignore_errors=True)


def store(tools: Tools) -> Path:
    """Data root of the engine that builds; generations of Docker do not share one."""
    return cache_folder("builder", tools.prefix.name if tools.prefix else "installed")


@contextlib.contextmanager
def store_lock(tools: Tools) -> Iterator[None]:
    with locked(store(tools).with_suffix(".lock"), what="the image store"):
        yield


@contextlib.contextmanager
def store_in_use(tools: Tools) -> Iterator[None]:
    """No layer of the store is removed while any testbed holds this."""
    with (store(tools).with_suffix(".use")).open("w") as users:
        fcntl.flock(users.fileno(), fcntl.LOCK_SH)
        yield


def ensure_image(tools: Tools) -> str:
    """The image's tag, after a build if an input changed since the last one."""
    with store_lock(tools):
        stamp = store(tools) / "built"
        wanted = fingerprint()
        if not stamp.exists() or stamp.read_text() != wanted:
            with builder(tools, store(tools)) as engine:
                build(engine)
            stamp.write_text(wanted)
    return IMAGE


def build(engine: Engine, *, progress: str = "quiet", project: Path = PROJECT) -> str:
    """`docker buildx build` of the real Dockerfile; the build's output."""
    base = base_image(engine.tools, engine.docker_host)
    say(f"building {IMAGE} on {base}")
    options = [f"--progress={progress}", f"--build-arg=BASE_IMAGE={base}", f"--build-context=wheels={wheelhouse()}"]
    output = buildx(engine, project, IMAGE, *options)
    with (store(engine.tools).with_suffix(".use")).open("w") as users:
        # Layers of earlier builds may be mounted in another testbed; then the next build removes them.
        if try_lock(users.fileno()):
            run(["docker", "image", "prune", "--force"], env=engine.environment)
    return output


def buildx(engine: Engine, context: Path, tag: str, *options: str) -> str:
    """`docker buildx build` of a folder, with this machine's way to its package index; the build's output."""
    proxies = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "no_proxy")]
    command = ["docker", "buildx", "build", "--network=host", f"--tag={tag}", *options]
    command += [f"--build-arg={name}={os.environ[name]}" for name in proxies]
    return run([*command, str(context)], env=engine.environment, timeout=1800)


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


def share_images(tools: Tools, data: Path) -> dict[Path, Path]:
    """Give an engine that does not run yet all images of the store without copying a layer.

    Returns the layers' folders that the engine has to mount: {in the store: in its data root}. Both stay in the names
    and places of Docker's overlay2 driver, which are the same since 2017.
    """
    source = store(tools)
    data.mkdir(parents=True)
    run(["cp", "-a", source / "image", data / "image"])
    (data / "overlay2").mkdir()
    run(["cp", "-a", source / "overlay2" / "l", data / "overlay2" / "l"])
    mounts = {}
    for identity in source.glob("image/overlay2/layerdb/sha256/*/cache-id"):
        layer, own = source / "overlay2" / identity.read_text(), data / "overlay2" / identity.read_text()
        for folder in ("diff", "work"):
            (own / folder).mkdir(parents=True)
        # Small files beside the layer's content, which the engine writes anew when a container uses the layer.
        for file in layer.iterdir():
            if file.is_file():
                shutil.copy(file, own)
        mounts[layer / "diff"] = own / "diff"
    return mounts
