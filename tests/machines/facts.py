"""A made-up machine as the launcher sees it, without what depends on the machine that runs the test."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from app.config.settings import Settings, read_settings
from app.host import Host
from app.plan import Draft, draft, probe_for
from tests.machines.library import MACHINES


def settings_of(environ: Mapping[str, str], env_file: Path | None = None, *argv: str) -> Settings:
    return read_settings(environ, env_file, argv)


def host_of(settings: Settings, root: Path) -> Host:
    """The facts below `root`; Python's version and this project's place are fixed."""
    return replace(probe_for(settings, root), python="3.12.3", project=Path("/opt/torchrun-compose"))


def drafted(machine: str, root: Path, *argv: str, **changes: str) -> Draft:
    """What the launcher decides on a machine of the library; `changes` to its user's settings, "" to unset."""
    environ = {**MACHINES[machine](root), **changes}
    settings = settings_of(environ, None, *argv)
    return draft(settings, host_of(settings, root))
