"""Which hosts there are, and where the project lies on them: from the same `.env` that the nodes read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from app.config.errors import UserError, printable
from app.config.problems import refusal
from app.config.settings import Settings, read_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One node as the desk names it."""

    name: str
    """What `ssh` is told: an address, a name, or an alias of the user's ssh configuration."""
    rank: int
    """Its place in the list; the node's rank where NODES lists the same machines in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What every command works on."""

    project: Path
    """The checkout: the folder with compose.yaml and `.env`."""
    settings: Settings
    hosts: tuple[Host, ...]
    folder: str
    """The project's folder on each host; relative to the home folder there."""

    def only(self, names: Sequence[str]) -> "Desk":
        """The same with these hosts alone. Raises UserError for a name that is none."""
        known = {each.name for each in self.hosts} | {str(each.rank) for each in self.hosts}
        if unknown := [name for name in names if name not in known]:
            listed = ", ".join(each.name for each in self.hosts)
            raise UserError(f"{printable(unknown[0])} is no host of this job. Its hosts are {listed}.")
        return replace(self, hosts=tuple(each for each in self.hosts if {each.name, str(each.rank)} & {*names}))


def project_folder(start: Path) -> Path:
    """`start` or the nearest folder above it that holds this project. Raises UserError."""
    for folder in (start, *start.parents):
        if (folder / "compose.yaml").is_file() and (folder / "hardware").is_dir():
            return folder
    raise UserError(
        f"{start} is not in a checkout of torchrun-compose. Go there, or name it: torchrun-compose -C FOLDER"
    )


def read_desk(start: Path, environ: Mapping[str, str]) -> Desk:
    """The hosts of HOSTS, else of NODES. Raises UserError where the settings name none."""
    project = project_folder(start)
    settings = read_settings(environ, project / (environ.get("ENV_FILE") or ".env"))
    if settings.problems:
        raise refusal(settings.problems)
    named = settings.hosts or settings.nodes
    if named is None or not named.value:
        raise UserError(f"No hosts: set NODES in {project / '.env'}, or HOSTS where ssh knows them by other names.")
    for name in named.value:
        # What begins with a dash would be an option of ssh.
        if not re.fullmatch(r"[A-Za-z0-9_:\[][A-Za-z0-9_.:%@\[\]-]*", name):
            raise UserError(f"{printable(name)} in {named} is not a name that ssh could know.")
    if len(set(named.value)) != len(named.value):
        raise UserError(f"{named} lists a host twice.")
    if settings.hosts and settings.nodes and len(settings.hosts.value) != len(settings.nodes.value):
        raise UserError(f"{settings.hosts} and {settings.nodes} differ in length: each host is one node.")
    hosts = tuple(Host(name=name, rank=rank) for rank, name in enumerate(named.value))
    return Desk(project=project, settings=settings, hosts=hosts, folder=settings.host_dir.text)
