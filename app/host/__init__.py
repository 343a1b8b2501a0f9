"""Facts about this machine, probed once and read below a `root`, so that a test can hand over a made-up one."""

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.config.project import PROJECT
from app.host.accelerators import read_gpus
from app.host.accelerators.gpu import Gpus
from app.host.files import number, text
from app.host.limits import Limits, read_limits
from app.host.mounts import Mount, read_mounts
from app.host.names import Answer, resolve_names
from app.host.nccl_conf import NcclLine, read_nccl_conf
from app.host.nics import Nic, Route, read_nics, read_routes
from app.host.paths import Seen, importable, look_at, read_program
from app.host.rdma import RdmaPort, RdmaSoftware, read_rdma_ports, read_rdma_software


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What this machine (or container) is. No decisions."""

    hostname: str = ""
    uid: int = 0
    gid: int = 0
    container: bool = False
    inside: str = ""
    """What stands between this process and the machine's own network, host networking or not: `wsl`, `desktop` (Docker
    Desktop's virtual machine), `rootless` (an engine without root); "" if nothing is known to."""
    project: Path = PROJECT
    """Where this project's `app/` lies."""
    cwd: Path = Path("/")
    """Where relative paths begin."""
    nics: tuple[Nic, ...] = ()
    routes: tuple[Route, ...] = ()
    ephemeral_ports: tuple[int, int] | None = None
    """First and last port that the kernel hands out by itself."""
    first_user_port: int = 1024
    """Ports below it need root."""
    rdma_ports: tuple[RdmaPort, ...] = ()
    """InfiniBand and RoCE."""
    other_ports: tuple[RdmaPort, ...] = ()
    """Ports of cards that are neither, such as EFA."""
    nccl_conf: tuple[NcclLine, ...] = ()
    """What NCCL will read by itself."""
    rdma_software: RdmaSoftware = field(default_factory=RdmaSoftware)
    gpus: Gpus = field(default_factory=Gpus)
    limits: Limits = field(default_factory=Limits)
    answers: Mapping[str, Answer] = field(default_factory=dict)
    """For each name that was asked for: its addresses, or why there are none."""
    files: Mapping[str, Seen] = field(default_factory=dict)
    """What lies at each path that was asked for."""
    mounts: tuple[Mount, ...] = ()
    """Longest path first."""
    module: bool = True
    """Whether Python finds the module that was asked for."""
    program: tuple[str, str] = ("", "")
    """Where the script that was asked for lies, if need be on PATH, and how its text begins."""
    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of torch and NCCL as installed, and the list of all other `packages`, without importing any."""


def probe(
    root: Path = Path("/"),
    resolve: Sequence[str] = (),
    paths: Sequence[str] = (),
    module: str = "",
    python_path: str = "",
    program: str = "",
) -> Host:
    """Reads the machine below `root`; looks up the names in `resolve`; looks at `paths`, and for a Python module or a
    program.

    What cannot be read is absent from the answer, never an error.
    """
    live = root == Path("/")
    nics, ports = read_nics(root), read_rdma_ports(root)
    return Host(
        hostname=socket.gethostname() if live else text(root / "proc/sys/kernel/hostname") or "",
        uid=os.geteuid() if live else 1000,
        gid=os.getegid() if live else 1000,
        container=any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv")),
        inside=_inside(root),
        cwd=Path.cwd() if live else Path("/workspace"),
        nics=nics,
        routes=read_routes(root),
        ephemeral_ports=_port_range(root),
        first_user_port=number(root / "proc/sys/net/ipv4/ip_unprivileged_port_start") or 1024,
        rdma_ports=tuple(port for port in ports if port.for_nccl),
        other_ports=tuple(port for port in ports if not port.for_nccl),
        nccl_conf=read_nccl_conf(root),
        rdma_software=read_rdma_software(root),
        gpus=read_gpus(root),
        limits=read_limits(root),
        answers=resolve_names(resolve, root),
        files={path: look_at(root, path) for path in paths},
        mounts=read_mounts(root),
        program=read_program(program) if live and program else ("", ""),
        module=not (live and module) or importable(module, python_path),
        python=".".join(map(str, sys.version_info[:3])),
        packages=_packages(root),
    )


def _inside(root: Path) -> str:
    kernel = (text(root / "proc/sys/kernel/osrelease") or "").lower()
    if "linuxkit" in kernel or "microsoft" in kernel:
        return "desktop" if "linuxkit" in kernel else "wsl"
    # Without root an engine is root of some user ids only, in a network that slirp4netns or pasta make.
    ids = (text(root / "proc/self/uid_map") or "").split()
    return "rootless" if (root / ".dockerenv").exists() and ids and ids[-1] != str(2**32 - 1) else ""


def _port_range(root: Path) -> tuple[int, int] | None:
    words = (text(root / "proc/sys/net/ipv4/ip_local_port_range") or "").split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else None


def _packages(root: Path) -> dict[str, str]:
    # The folder's name carries the version: importlib.metadata would parse every package's metadata for the same.
    wanted = {"torch": "torch", "nvidia_nccl_cu12": "nccl", "nvidia_nccl_cu13": "nccl"}
    installed = [Path(entry) for entry in sys.path if entry.endswith("-packages")]
    folders = installed if root == Path("/") else list(root.glob("opt/venv/lib/python3*/site-packages"))
    found, others = dict[str, str](), set[str]()
    for info in (info for folder in folders for info in folder.glob("*.dist-info")):
        name, _, version = info.name.removesuffix(".dist-info").partition("-")
        if name in wanted:
            found.setdefault(wanted[name], version)
        else:
            others.add(f"{name}-{version}")
    # Far below what one line of the nodes' talk may hold.
    return {**found, "packages": " ".join(sorted(others))[:20_000]} if others else found
