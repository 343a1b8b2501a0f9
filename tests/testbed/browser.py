"""Headless Chromium: the machine's own, else Debian's, fetched into the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.testbed.engines import debian_release, private_apt
from tests.testbed.shell import cache_folder, locked, run

PACKAGE = "chromium-headless-shell"
OWN = (PACKAGE, "chromium", "google-chrome")


def page_text(url: str, seconds: int, *options: str) -> str:
    """The page's document after so many seconds of the browser's own time. Raises BedError where there is none."""
    command, environment = browser()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--virtual-time-budget={seconds * 1000}", "--dump-dom"]
    done = subprocess.run(
        [*command, *flags, *options, url], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def browser() -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(cache_folder("browser-home"))}
    for name in OWN:
        if own := shutil.which(name):
            return [own], environment
    machine = debian_release()
    with locked(cache_folder() / "packages.lock", what="the package cache"):
        prefix = cache_folder("engines", f"browser-on-{machine}")
        if not (prefix / "complete").exists():
            fetch(prefix, machine)
    (folder,) = prefix.glob("usr/lib/*-linux-gnu")
    environment["LD_LIBRARY_PATH"] = f"{folder}:{folder}/pulseaudio"
    return [str(prefix / "usr/lib/chromium" / PACKAGE)], environment


def fetch(prefix: Path, machine: str) -> None:
    """With what it needs beyond the machine's own libraries."""
    shutil.rmtree(prefix)
    apt = private_apt(prefix / "apt", [machine])
    run([*apt, "-q", "update"], timeout=300)
    wanted = ["install", "--yes", "--download-only", "--no-install-recommends", "-o", "Debug::NoLocking=1", PACKAGE]
    run([*apt, "-q", *wanted], timeout=300)
    for archive in sorted((prefix / "apt/cache/archives").glob("*.deb")):
        run(["dpkg", "-x", archive, prefix])
    shutil.rmtree(prefix / "apt")
    (prefix / "complete").touch()
