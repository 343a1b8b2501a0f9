"""What the launcher takes with it into an image, and what it asks of one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_docs import PROJECT

LIBRARY = PROJECT / "app/lib"


def test_the_library_in_the_tree_is_the_one_that_the_locks_name() -> None:
    (wheel,) = LIBRARY.iterdir()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for lock in ("cpu", "cuda", "rocm"):
        assert f"--hash=sha256:{digest}" in (PROJECT / f"requirements/{lock}.txt").read_text()


def test_the_launcher_needs_no_package_of_the_image(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RUN_NAME=bare\n")
    command = [sys.executable, "-S", str(PROJECT / "entrypoint.py"), "explain", "a.py"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert "RUN_NAME=bare (.env:1)" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("torch", "why"),
    [(None, "it has no torch"), ("torch/__init__.py", "its torch is too old: it lacks distributed/elastic")],
)
def test_an_image_without_a_torch_that_can_train_is_refused_with_each_python_and_why(
    tmp_path: Path, torch: str | None, why: str
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    if torch:
        (packages / torch).parent.mkdir()
        (packages / torch).touch()
    python = tmp_path / "python"
    # Without any package of this machine but those of the folder.
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", PROJECT / "app/start.sh", "--version"], env=env, capture_output=True, text=True)
    if not done.returncode:
        pytest.skip("another Python of this machine has a torch")
    assert done.returncode == 2
    assert f"{python}: {why}" in done.stderr
