"""Find a Docker engine on this machine, or fetch Debian's into the cache without touching the system.

The packages come through apt (signed lists, checked hashes) with private folders for its lists and its archive.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.testbed.shell import BedError, cache_folder, locked, run, say

DEFAULT_MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITES = {"12": "bookworm", "13": "trixie"}
ENGINE = ("docker.io", "docker-cli", "docker-compose", "docker-buildx", "containerd")
# runc is dynamic, and trixie's wants a newer C library than Debian 12 has: such come from the machine's own release.
HELPERS = (
    "runc",
    "tini",
    "nftables",
    "libnftables1",
    "libnftnl11",
    "libmnl0",
    "libjansson4",
    "libxtables12",
    "debootstrap",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """Programs of one Docker generation, and how to start them."""

    path: str
    """PATH under which docker, dockerd, runc, nft and debootstrap are found."""
    config: Path
    """DOCKER_CONFIG: names the folders of the CLI's plugins."""
    prefix: Path | None
    """Where Debian's packages are unpacked; None if everything is the machine's own."""

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """A small environment of its own, so that nothing set in the caller's shell changes what a test sees."""
        home = os.environ.get("HOME", "/root")
        return {
            "PATH": self.path,
            "HOME": home,
            "DOCKER_CONFIG": str(self.config),
            "LC_ALL": "C.UTF-8",
            **(extra or {}),
        }

    def which(self, program: str) -> str:
        """Full path of a program. Raises BedError if it is nowhere."""
        found = shutil.which(program, path=self.path)
        if found is None:
            raise BedError(f"{program} is neither on this machine nor among the fetched packages")
        return found

    def nft(self) -> tuple[list[str], dict[str, str]]:
        """nft's command and environment: unpacked, it finds its libraries only by LD_LIBRARY_PATH."""
        env = self.environment()
        program = self.which("nft")
        if self.prefix and Path(program).is_relative_to(self.prefix):
            env["LD_LIBRARY_PATH"] = ":".join(str(path) for path in sorted(self.prefix.glob("usr/lib/*-linux-*")))
        return [program], env


def find_tools() -> Tools:
    """The machine's own engine if it is complete, else Debian 13's.

    TESTBED_SUITE=sid takes Debian's newest instead: another generation of Docker and of Compose.
    Raises BedError with a sentence when no engine can be had.
    """
    suite = os.environ.get("TESTBED_SUITE", "")
    if os.geteuid() != 0:
        raise BedError("the testbed needs root (network namespaces, Docker engines): run it with sudo")
    own = None if suite else installed_tools()
    if own is not None:
        return own
    with locked(cache_folder() / "packages.lock", what="the package cache"):
        return fetched_tools(suite or "trixie")


def installed_tools() -> Tools | None:
    path = with_sbin(os.environ.get("PATH", ""))
    needed = ("docker", "dockerd", "runc", "nft", "ip", "tc")
    if not all(shutil.which(name, path=path) for name in needed):
        return None
    config = write_config(cache_folder("docker-config-installed"), ())
    for plugin in ("compose", "buildx"):
        probe = subprocess.run(
            ["docker", plugin, "version"],
            env={"PATH": path, "DOCKER_CONFIG": str(config)},
            capture_output=True,
            check=False,
            timeout=30,
        )
        if probe.returncode != 0:
            return None
    return Tools(path=path, config=config, prefix=None)


def fetched_tools(suite: str) -> Tools:
    machine = debian_release()
    prefix = cache_folder("engines", f"{suite}-on-{machine}")
    if not (prefix / "complete").exists():
        unpack(prefix, suite, machine)
    plugins = (prefix / "usr/libexec/docker/cli-plugins",)
    config = write_config(cache_folder(f"docker-config-{suite}"), plugins)
    path = with_sbin(f"{prefix}/usr/bin:{prefix}/usr/sbin:{os.environ.get('PATH', '')}")
    return Tools(path=path, config=config, prefix=prefix)


def unpack(prefix: Path, suite: str, machine: str) -> None:
    say(f"no complete Docker engine on this machine: fetching Debian's ({suite}) into {prefix}, about 95 MB")
    wanted = [f"{name}/{suite}" for name in ENGINE] + [f"{name}/{machine}" for name in HELPERS]
    fetch(prefix, wanted, {suite, machine})


def fetch(prefix: Path, wanted: Sequence[str], suites: Collection[str]) -> None:
    """Unpack packages, each as NAME/SUITE, below a folder of the cache."""
    shutil.rmtree(prefix)
    archives = prefix / "archives"
    archives.mkdir(parents=True)
    apt = private_apt(prefix / "apt", sorted(suites))
    run([*apt, "-q", "update"], timeout=300)
    run([*apt, "-q", "download", *wanted], cwd=archives, timeout=600)
    for archive in sorted(archives.glob("*.deb")):
        run(["dpkg", "-x", archive, prefix])
    shutil.rmtree(archives)
    shutil.rmtree(prefix / "apt")
    (prefix / "complete").touch()


def private_apt(folder: Path, suites: Sequence[str]) -> list[str]:
    """The start of an apt-get command that reads and writes only below `folder`."""
    if not KEYRING.exists():
        raise BedError(
            f"{KEYRING} is missing, so Debian's packages cannot be checked: install Docker Engine + Compose v2"
        )
    for part in ("sources.d", "lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lines = [f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n" for suite in suites]
    (folder / "sources.d" / "testbed.list").write_text("".join(lines))
    options = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": folder / "sources.d",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        # Its user _apt cannot write below a home folder.
        "APT::Sandbox::User": "root",
        # Snapshots of Debian's archive carry lists that are past their date.
        "Acquire::Check-Valid-Until": "false",
    }
    return ["apt-get", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]


def debian_release() -> str:
    """This machine's Debian release by name; BedError on anything but Debian 12 and 13."""
    version = Path("/etc/debian_version")
    major = version.read_text().split(".")[0].strip() if version.exists() else ""
    identity = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    if major not in SUITES or not re.search(r"^ID=\"?debian\"?$", identity, re.MULTILINE):
        raise BedError(
            "no Docker engine here (docker, dockerd, runc, nft, Compose v2 and buildx are needed), and packages are "
            "fetched only on Debian 12 and 13: install Docker Engine, or set CLUSTER_TESTS=skip"
        )
    return SUITES[major]


def mirror(etc_apt: Path = Path("/etc/apt")) -> str:
    """The Debian archive this machine's own apt uses, so that a private mirror is honoured."""
    files = [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*"))]
    for file in files:
        if file.suffix not in (".list", ".sources") or not file.is_file():
            continue
        for line in file.read_text(errors="replace").splitlines():
            found = re.match(r"\s*(?:URIs:|deb\s+(?:\[[^]]*\]\s+)?)\s*(https?://\S+/debian)/?(?:\s|$)", line)
            if found:
                return found.group(1)
    return DEFAULT_MIRROR


def write_config(folder: Path, plugins: Sequence[Path]) -> Path:
    (folder / "config.json").write_text(json.dumps({"cliPluginsExtraDirs": [str(path) for path in plugins]}))
    return folder


def with_sbin(path: str) -> str:
    return f"{path}:/usr/local/sbin:/usr/sbin:/sbin"
