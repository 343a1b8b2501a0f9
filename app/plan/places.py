"""Where a folder of the container lies on its host."""

import os.path
import re
from pathlib import Path

from app.config.settings import Settings
from app.host import Host
from app.host.mounts import mount_of
from app.plan.parts import Script

WRITTEN = ("WORKSPACE", "RUNS", "DATA_DIR")
"""Variables of compose.yaml with a folder of the host."""


def on_host(path: Path, host: Host, settings: Settings) -> Path | None:
    """The path that the host's users know; None outside a container, and for what is in the container alone."""
    mount = mount_of(path, host.mounts) if host.container else None
    if mount is None or mount.point == "/" or mount.source == "/":
        return None
    return Path(_whole(mount.source, settings)) / path.relative_to(mount.point)


def _whole(source: str, settings: Settings) -> str:
    """A mount knows its folder only within a file system of the host: /me/stack where /home is one of its own. What the
    user wrote tells the rest."""
    stack = settings.text("STACK_DIR") or "/"
    known = [os.path.normpath(Path(stack, settings.text(name))) for name in WRITTEN if settings.is_set(name)]
    return next((each for each in known if each.endswith(source)), source)


def volume(path: Path) -> str:
    """The name of the volume that a host's path lies in; "" if it is a folder of the user's."""
    found = re.search(r"/volumes/([^/]+)/_data(/|$)", str(path))
    return found[1] if found else ""


def results(script: Script) -> str:
    """Where a person finds checkpoints, logs and pictures, or the command that brings them out of a volume."""
    found = [_place(script.run_dir, script.places[0])]
    if not script.checkpoint_dir.is_relative_to(script.run_dir):
        found.append(f"checkpoints: {_place(script.checkpoint_dir, script.places[1])}")
    return "; ".join(found)


def _place(path: Path, place: Path | None) -> str:
    if place is None:
        return str(path)
    if name := volume(place):
        return f"{path} in volume {name} (`docker compose cp trainer:{path} .`)"
    return f"{place} on this host"
