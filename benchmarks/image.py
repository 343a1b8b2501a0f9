"""Size of the CPU image and what is in it, first build and rebuild after an edit: `python -m benchmarks.image`.

Needs root. The builds run on an engine of their own with an empty store; packages come from wherever this machine's pip
and apt get them, so the first build's time says as much about that as about the image.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.testbed.base import base_image
from tests.testbed.engine import Engine
from tests.testbed.engines import find_tools
from tests.testbed.image import IMAGE, INPUTS, build, builder
from tests.testbed.shell import PROJECT

EDITS = 3
PARTS = {
    "base": "ADD|import",
    "system packages (Python, RDMA libraries)": "apt-get",
    "Python packages (torch, numpy, tensorboard, ...)": "COPY /opt/venv",
    "launcher and training script": "COPY app|COPY --chmod|compileall",
}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, builder(find_tools(), Path(folder) / "engine") as engine:
        project = Path(folder) / "project"
        copy_inputs(project)
        base = base_image(engine.tools, engine.docker_host)
        first = timed_build(engine, project)
        edits = []
        for number in range(EDITS):
            (project / "app" / "edited.py").write_text(f"NUMBER = {number}\n")
            before = engine.client.images.get(IMAGE).id
            edits.append(timed_build(engine, project))
            if engine.client.images.get(IMAGE).id == before:
                raise SystemExit("the edit did not reach the image")
        print(f"base image: {base}")
        report_size(engine)
        print(f"first build: {first:.0f} s (packages included)")
        print(f"rebuild after an edit under app/: {min(edits):.1f} to {max(edits):.1f} s, {EDITS} times")
    return 0


def copy_inputs(project: Path) -> None:
    project.mkdir()
    for name in INPUTS:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, project / name)


def timed_build(engine: Engine, project: Path) -> float:
    start = time.monotonic()
    build(engine, project=project)
    return time.monotonic() - start


def report_size(engine: Engine) -> None:
    image = engine.client.images.get(IMAGE)
    layers = [layer for layer in image.history() if layer["Size"]]
    print(f"image: {image.attrs['Size'] / 1e6:,.0f} MB")
    for what, words in PARTS.items():
        size = sum(layer["Size"] for layer in layers if any(word in layer["CreatedBy"] for word in words.split("|")))
        # An imported base has a layer without a command.
        size += sum(layer["Size"] for layer in layers if what == "base" and not layer["CreatedBy"])
        print(f"  {what}: {size / 1e6:,.0f} MB" if size >= 1e6 else f"  {what}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
