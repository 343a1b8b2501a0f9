"""A desk beside a cluster: a network of its own, the machine's own ssh, and OpenSSH's server on every node.

The user on the nodes is not root: as on real hosts, Docker is theirs by the group of its socket.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.testbed import network
from tests.testbed.cluster import Cluster
from tests.testbed.engines import Tools, debian_release, fetch, with_sbin
from tests.testbed.node import Node
from tests.testbed.shell import PROJECT, BedError, cache_folder, locked, run, until
from tests.testbed.stack import Finished, lay_out

PACKAGES = ("openssh-server", "libwrap0")
USER, UID = "ada", 1000
CHECKOUT = ("Dockerfile", ".dockerignore", "entrypoint.py", "app", "requirements")
# Runs in the node's namespaces, with a mount namespace of its own. /run is a folder of this node: its Docker's socket
# at the usual place, and the programs of the testbed, which lie where only root may look.
SERVE = """
set -e
home=$1; engine=$2; tools=$3; sshd=$4
mkdir -p "$home/run/sshd" "$home/run/engine" "$home/run/tools" "$home/full"
mount -t tmpfs -o size=64k,mode=777 tmpfs "$home/full"
chmod 755 "$home/run/sshd"
ln -sfn engine/docker.sock "$home/run/docker.sock"
mount --bind "$engine" "$home/run/engine"
[ -z "$tools" ] || mount --bind "$tools" "$home/run/tools"
mount --bind "$home/passwd" /etc/passwd
mount --rbind "$home/run" /run
exec "$sshd" -D -e -f "$home/sshd_config"
"""
SETTINGS = """
Port 22
HostKey {home}/host_key
PidFile none
UsePAM no
PasswordAuthentication no
StrictModes no
AuthorizedKeysFile {home}/authorized_keys
SetEnv PATH={path}
"""
DESK = 'mount --bind "$1/passwd" /etc/passwd && shift && exec "$@"'


@dataclass(slots=True, kw_only=True)
class Host:
    """The ssh server of a node."""

    node: Node
    name: str
    """What the desk's ssh calls it."""
    home: Path
    sshd: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def folder(self) -> Path:
        """What `push` makes there."""
        return self.home / "home" / "torchrun-compose"

    def start(self) -> None:
        first = self.node.engine.first_pid
        tools = self.node.engine.tools.prefix
        enter = ["nsenter", f"--target={first}", "--mount", "--uts", f"--net=/run/netns/{self.node.name}"]
        words = [self.home, self.node.engine.home, tools or "", self.sshd]
        with (self.home / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *enter, "unshare", "--mount", "sh", "-c", SERVE, "sh", *words],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(self.listens, deadline=10, what=f"the ssh server of {self.name}")
        self.allow_docker()

    def set_path(self, path: str) -> None:
        """Where commands over ssh find programs, from the next connection on."""
        (self.home / "sshd_config").write_text(SETTINGS.format(home=self.home, path=path))
        self.stop()
        self.start()

    def listens(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise BedError(f"sshd of {self.name} ended:\n{(self.home / 'sshd.log').read_text()}")
        return "0.0.0.0:22 " in self.node.shell("ss", "-Hltn")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def allow_docker(self, allowed: bool = True) -> None:
        """Whether the user is of the group that may use Docker."""
        os.chown(self.node.engine.home / "docker.sock", 0, UID if allowed else 0)

    def accept(self, key: Path | None) -> None:
        """Which key the server lets in; None: no key at all."""
        (self.home / "authorized_keys").write_text(key.read_text() if key else "")

    def new_host_key(self) -> None:
        """As after setting the machine up anew."""
        (self.home / "host_key").unlink(missing_ok=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.home / "host_key"])


@dataclass(slots=True, kw_only=True)
class DeskBed:
    """The machine from which the cluster is used."""

    name: str
    """Of its network namespace."""
    home: Path
    hosts: list[Host]
    project: Path
    """The user's checkout."""
    tools: Tools

    def command(self, *words: str) -> list[str]:
        """`torchrun-compose WORDS` on the desk."""
        python = str(PROJECT / ".venv/bin/python")
        return self.on_desk(python, "-m", "app.fleet", "-C", str(self.project), *words)

    def on_desk(self, *words: str) -> list[str]:
        enter = ["nsenter", f"--net=/run/netns/{self.name}", "unshare", "--mount"]
        return [*enter, "sh", "-c", DESK, "sh", str(self.home), *words]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.home),
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(PROJECT),
        }

    def run(self, *words: str, timeout: float = 120, env: Mapping[str, str] | None = None) -> Finished:
        """The exit code and all that a command said. It runs in the desk's home folder."""
        done = subprocess.run(
            self.command(*words),
            env={**self.environment, **(env or {})},
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            text=True,
        )
        return Finished(code=done.returncode, output=done.stdout)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """The same in the background, in a process group of its own, where Ctrl-C is not ignored."""
        return subprocess.Popen(
            ["env", "--default-signal=INT", *self.command(*words)],
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    def disconnect(self) -> None:
        """End all shared connections: what comes next begins as on another day."""
        for socket in (self.home / f"torchrun-compose-{os.getuid()}").glob("*"):
            close = ["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "none"]
            subprocess.run(self.on_desk(*close), env=self.environment, capture_output=True, check=False, timeout=10)

    def write_env(self, env: Mapping[str, str]) -> None:
        lines = {"ENV_FILE": "./.env", "NODES": ",".join(host.node.address for host in self.hosts)}
        lines |= {"HOSTS": ",".join(host.name for host in self.hosts), "IMAGE": "torchrun-compose:cpu", **env}
        (self.project / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))


@contextlib.contextmanager
def desk_beside(bed: Cluster) -> Iterator[DeskBed]:
    """ssh servers on all nodes of the cluster, and a desk that knows their host keys and has a key for them."""
    sshd, environment = ssh_server()
    home = Path(tempfile.mkdtemp(prefix=f"{bed.name}-desk-", dir="/var/tmp"))
    home.chmod(0o755)
    name = f"{bed.name}d"
    hosts: list[Host] = []
    desk = DeskBed(name=name, home=home, hosts=hosts, project=home / "project", tools=bed.tools)
    remove(name)
    try:
        network.add_namespace(name)
        address = f"10.77.{bed.number}.9/24"
        network.add_link(netns=name, bridge=bed.name, interface="eth0", address=address, outside=f"{name}p")
        key = home / ".ssh" / "id_ed25519"
        key.parent.mkdir(mode=0o700)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])
        write_passwd(home, f"root:x:0:0::{home}:/bin/sh")
        for node in bed.nodes:
            hosts.append(add_host(node, home, sshd, environment, bed.tools))
            hosts[-1].accept(key.with_suffix(".pub"))
            hosts[-1].start()
        config = [f"Host {host.name}\n  HostName {host.node.address}\n  User {USER}\n" for host in hosts]
        (key.parent / "config").write_text("".join(config))
        known = [f"{host.node.address} {(host.home / 'host_key.pub').read_text()}" for host in hosts]
        (key.parent / "known_hosts").write_text("".join(known))
        lay_out(desk.project, {}, {})
        for part in CHECKOUT:
            source, to = PROJECT / part, desk.project / part
            shutil.copytree(
                source, to, ignore=shutil.ignore_patterns("__pycache__")
            ) if source.is_dir() else shutil.copy(source, to)
        desk.write_env({})
        yield desk
    finally:
        for host in hosts:
            host.stop()
        remove(name)
        shutil.rmtree(home, ignore_errors=True)


def add_host(node: Node, above: Path, sshd: Path, environment: Mapping[str, str], tools: Tools) -> Host:
    host = Host(node=node, name=f"gpu-{'abcd'[node.index]}", home=above / node.name, sshd=sshd, environment=environment)
    user_home = host.home / "home"
    (user_home / ".docker").mkdir(parents=True)
    path = "/usr/bin:/bin"
    if tools.prefix:
        path = f"/run/tools/usr/bin:{path}"
        plugins = '{"cliPluginsExtraDirs": ["/run/tools/usr/libexec/docker/cli-plugins"]}'
        (user_home / ".docker/config.json").write_text(plugins)
    run(["chown", "-R", f"{UID}:{UID}", user_home])
    write_passwd(host.home, f"{USER}:*:{UID}:{UID}::{user_home}:/bin/sh")
    (host.home / "sshd_config").write_text(SETTINGS.format(home=host.home, path=path))
    host.new_host_key()
    return host


def write_passwd(folder: Path, *lines: str) -> None:
    """This machine's users with these in place of those of the same name or number."""
    names = {line.split(":")[0] for line in lines} | {"sshd"}
    numbers = {line.split(":")[2] for line in lines}
    kept = [
        line
        for line in Path("/etc/passwd").read_text().splitlines()
        if line.split(":")[0] not in names and line.split(":")[2] not in numbers
    ]
    # Privilege separation asks for this user.
    own = "sshd:*:110:65534::/run/sshd:/usr/sbin/nologin"
    (folder / "passwd").write_text("\n".join([*lines, *kept, own, ""]))


def ssh_server() -> tuple[Path, dict[str, str]]:
    """OpenSSH's server: the machine's own, else Debian's, fetched into the cache; and the environment to start it."""
    own = shutil.which("sshd", path=with_sbin(os.environ.get("PATH", "")))
    if own:
        return Path(own), {"PATH": "/usr/bin:/bin"}
    machine = debian_release()
    with locked(cache_folder() / "packages.lock", what="the package cache"):
        prefix = cache_folder("engines", f"sshd-on-{machine}")
        if not (prefix / "complete").exists():
            fetch(prefix, [f"{name}/{machine}" for name in PACKAGES], {machine})
    libraries = ":".join(str(path) for path in sorted(prefix.glob("usr/lib/*-linux-*")))
    return prefix / "usr/sbin/sshd", {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": libraries}


def remove(name: str) -> None:
    network.remove_link(f"{name}p")
    network.remove_namespace(name)
