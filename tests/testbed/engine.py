"""One Docker engine in namespaces of its own, so that ending one process ends all of it: containers, shims, mounts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import docker
import requests.exceptions
from docker.errors import DockerException

from tests.testbed.engines import Tools
from tests.testbed.shell import BedError, until

READY_SECONDS = 60
# Runs as the first process of the engine's namespaces; $1 is the engine's folder, $2 its data root, the rest is
# dockerd's command. /etc/hosts is the node's own because Docker copies it into containers with host networking. Image
# layers of the store are mounted in, read-only; like all mounts they go with the namespace. The folders above them are
# made mounts first: dockerd would do so itself, over them.
PREPARE = """
set -e
home=$1; data=$2; shift 2
mount --bind "$home/hosts" /etc/hosts
cat "$home/hostname" > /proc/sys/kernel/hostname
for folder in "$data" "$data/overlay2"; do mount --bind "$folder" "$folder"; done
while read -r from to; do mount --bind -o ro "$from" "$to"; done < "$home/layers"
exec docker-init -- "$@"
"""


@dataclass(slots=True, kw_only=True)
class Engine:
    """A dockerd with data root, socket, process, mount and host-name namespaces of its own, in a given network."""

    name: str
    tools: Tools
    home: Path
    """Sockets and small files; must be short, since a Unix socket's path is limited to 107 bytes."""
    data: Path
    netns: str | None
    """Name of the network namespace, None for the machine's own."""
    layers: Mapping[Path, Path] = field(default_factory=dict)
    """Folders to mount read-only into the data root: {from: to}. Their paths hold no blanks."""
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    sdk: docker.DockerClient | None = field(default=None, init=False)

    @property
    def docker_host(self) -> str:
        """DOCKER_HOST of this engine."""
        return f"unix://{self.home}/docker.sock"

    @property
    def environment(self) -> dict[str, str]:
        """Environment for the docker CLI, with nothing of the caller's shell in it."""
        return self.tools.environment({"DOCKER_HOST": self.docker_host})

    @property
    def log(self) -> Path:
        """What dockerd said."""
        return self.home / "dockerd.log"

    def launch(self) -> None:
        """Start dockerd and return at once; `ready` waits for it.

        The engine dies with the thread that calls this: nothing survives a killed test run.
        """
        for folder in (self.home / "bin", self.home / "cdi", self.data / "overlay2"):
            folder.mkdir(parents=True, exist_ok=True)
        self.write_files()
        enter = ["nsenter", f"--net=/run/netns/{self.netns}"] if self.netns else []
        spaces = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--mount-proc", "--uts"]
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            *enter,
            *spaces,
            "sh",
            "-c",
            PREPARE,
            "sh",
            str(self.home),
            str(self.data),
        ]
        env = self.tools.environment()
        # Stand-ins for hooks of the GPU vendor are found here before any real one.
        env["PATH"] = f"{self.home}/bin:{env['PATH']}"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.dockerd()], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )

    def write_files(self) -> None:
        for name in ("docker.pid", "docker.sock"):
            (self.home / name).unlink(missing_ok=True)
        shutil.rmtree(self.home / "exec", ignore_errors=True)
        for name, default in (("hosts", Path("/etc/hosts")), ("hostname", Path("/proc/sys/kernel/hostname"))):
            if not (self.home / name).exists():
                (self.home / name).write_text(default.read_text())
        (self.home / "layers").write_text("".join(f"{source} {to}\n" for source, to in self.layers.items()))
        # Docker 29 keeps images in containerd by default; cloning a data root is written for the graph driver.
        features = {"cdi": True, "containerd-snapshotter": False}
        settings = {"features": features, "cdi-spec-dirs": [str(self.home / "cdi")], "storage-driver": "overlay2"}
        (self.home / "daemon.json").write_text(json.dumps(settings))

    def dockerd(self) -> list[str]:
        return [
            "dockerd",
            f"--config-file={self.home}/daemon.json",
            f"--data-root={self.data}",
            f"--exec-root={self.home}/exec",
            f"--pidfile={self.home}/docker.pid",
            f"--host={self.docker_host}",
            # The containers share their node's network: Docker has nothing to set up, and must not touch a firewall.
            "--iptables=false",
            "--ip6tables=false",
            "--bridge=none",
            # A folder of our own in every cgroup hierarchy can be found and removed after an interrupted run.
            "--exec-opt=native.cgroupdriver=cgroupfs",
            f"--cgroup-parent=/{self.name}",
        ]

    def ready(self) -> None:
        """Wait until the engine answers. Raises BedError with the end of its log when it does not start."""
        try:
            until(self.answers, deadline=READY_SECONDS, what=f"the Docker engine of {self.name}")
        except BedError as error:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise BedError(f"{error}; its log ends with:\n{tail}") from None

    def answers(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise BedError(f"the Docker engine of {self.name} ended with {self.process.returncode}")
        if not (self.home / "docker.sock").exists():
            return False
        try:
            return bool(self.client.ping())
        except (DockerException, requests.exceptions.RequestException):
            return False

    @property
    def client(self) -> docker.DockerClient:
        """The docker SDK's client of this engine; it outlives a restart of the engine."""
        if self.sdk is None:
            self.sdk = docker.DockerClient(base_url=self.docker_host, timeout=60, version="1.43")
        return self.sdk

    @property
    def first_pid(self) -> int | None:
        """The process that holds the engine's namespaces, seen from outside; None when it does not run."""
        if self.process is None or self.process.poll() is not None:
            return None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def stop(self, grace: float = 20) -> None:
        """End dockerd as `systemctl stop docker` does: containers are asked first. Killed after `grace` seconds."""
        first = self.first_pid
        if first is not None and self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        self.kill()

    def kill(self) -> None:
        """End the engine and every container at once, as a power cut does."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait(10)
        self.process = None
        if self.sdk is not None:
            self.sdk.close()
            self.sdk = None


def remove_cgroups(name: str) -> None:
    """Remove the folders an engine called `name` left in the cgroup hierarchies."""
    root = Path("/sys/fs/cgroup")
    for top in (root / name, *root.glob(f"*/{name}")):
        if not top.is_dir():
            continue
        folders = sorted((path for path in top.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
        for folder in (*folders, top):
            # Busy while a process that was just killed is still leaving; the next testbed takes what stays.
            with contextlib.suppress(OSError):
                folder.rmdir()
