"""A node of the cluster: its network, its engine, the stacks on it, and what can go wrong with them."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.testbed import network
from tests.testbed.engine import Engine
from tests.testbed.shell import BedError, run
from tests.testbed.stack import SERVICE, Finished, Stack, lay_out

PROJECT_NAME = "job"
_numbers = itertools.count()


@dataclass(slots=True, kw_only=True)
class Node:
    """One machine of the cluster, as far as torchrun-compose can tell."""

    index: int
    name: str
    """Name of its network namespace, its engine and its cgroups on this machine."""
    interface: str
    address: str
    port: str
    """The bridge's end of its cable."""
    bridge: str
    engine: Engine
    folders: Path
    stacks: list[Stack] = field(default_factory=list)

    def stack(
        self,
        env: Mapping[str, str] | None = None,
        *,
        exports: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        project: str = PROJECT_NAME,
    ) -> Stack:
        """Lay out a checkout with `env` as its .env file; `files` by their paths in it, such as workspace/my.py."""
        folder = self.folders / f"stack{next(_numbers)}"
        lay_out(folder, env or {}, files or {})
        stack = Stack(engine=self.engine, folder=folder, project=project, exports=dict(exports or {}))
        self.stacks.append(stack)
        return stack

    def up(
        self,
        env: Mapping[str, str] | None = None,
        *,
        exports: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        project: str = PROJECT_NAME,
    ) -> Stack:
        """`docker compose up` with `env` in .env and `exports` in the user's shell; returns once it is started."""
        stack = self.stack(env, exports=exports, files=files, project=project)
        self.start(stack)
        return stack

    def start(self, stack: Stack) -> None:
        """`docker compose up` of a checkout that `stack` has laid out."""
        stack.compose("up", "--detach", "--no-build", timeout=120)

    def create(
        self,
        env: Mapping[str, str] | None = None,
        *,
        exports: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Stack:
        """`docker compose create`: all that the engine would be asked for, without starting it."""
        stack = self.stack(env, exports=exports, files=files)
        stack.compose("create", "--no-build")
        return stack

    def run(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        exports: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        options: tuple[str, ...] = (),
        timeout: float = 120,
    ) -> Finished:
        """`docker compose run --rm OPTIONS trainer WORDS`; its exit code and all it said."""
        stack = self.stack(env, exports=exports, files=files, project=f"{PROJECT_NAME}-run")
        return self.run_in(stack, *words, options=options, timeout=timeout)

    def run_in(self, stack: Stack, *words: str, options: tuple[str, ...] = (), timeout: float = 120) -> Finished:
        """The same in a checkout that `stack` has laid out."""
        command = stack.command("run", "--rm", "--no-TTY", *options, SERVICE, *words)
        try:
            done = subprocess.run(
                command,
                env=stack.environment,
                cwd=stack.folder,
                timeout=timeout,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        except subprocess.TimeoutExpired as late:
            said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout
            raise BedError(
                f"`{' '.join(words)}` on {self.name} ran longer than {timeout:g} s and said:\n{said}"
            ) from None
        return Finished(code=done.returncode, output=done.stdout)

    def shell(self, *command: str, timeout: float = 60) -> str:
        """Run a command of this machine in the node's network namespace; its standard output."""
        return run(["nsenter", f"--net=/run/netns/{self.name}", *command], timeout=timeout)

    def cut(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        network.set_port(self.port, up=False)

    def restore(self) -> None:
        """Plug the cable, open the firewall, take the brake off."""
        network.set_port(self.port, up=True)
        network.unblock(self.engine.tools, self.name)
        network.full_speed(self.name, self.interface, self.port)

    def block(self, *ports: int, reject: bool = False) -> None:
        """Firewall TCP ports against the other nodes: silence, or a refusal with `reject`."""
        network.block(self.engine.tools, self.name, ports=ports, reject=reject)

    def translate(self, addresses: Mapping[str, str]) -> None:
        """Have this node reach nodes under other addresses, {listed: real}, as behind address translation."""
        network.translate(self.engine.tools, self.name, self.interface, addresses)

    def slow(self, rate: str) -> None:
        """Limit the node's link, such as 10mbit."""
        network.slow(self.name, self.interface, self.port, rate)

    def kill(self, service: str = SERVICE) -> None:
        """SIGKILL to the container of the newest stack."""
        self.stacks[-1].kill(service)

    def stop_engine(self, grace: float = 20) -> None:
        """`systemctl stop docker`: the engine stops its containers, then ends."""
        self.engine.stop(grace)

    def start_engine(self) -> None:
        """Start the engine again; it restarts the containers that its restart policy names."""
        self.engine.launch()
        self.engine.ready()

    def crash(self) -> None:
        """Power cut: the cable first, so that no packet says goodbye, then every process of the node at once."""
        self.cut()
        self.engine.kill()

    def set_host_name(self, name: str, hosts: str | None = None) -> None:
        """Name the machine, and set its /etc/hosts if given; containers started from now on see both."""
        home = self.engine.home
        (home / "hostname").write_text(f"{name}\n")
        if hosts is not None:
            # In place: the file is mounted over /etc/hosts where the engine sees it.
            (home / "hosts").write_text(hosts)
        first = self.engine.first_pid
        if first is None:
            raise BedError(f"the engine of {self.name} does not run")
        run(["nsenter", f"--target={first}", "--uts", "sh", "-c", f"cat {home}/hostname > /proc/sys/kernel/hostname"])

    def add_interface(self, interface: str, address: str, *, bridge: str | None = None) -> str:
        """One more cable, to the cluster's bridge or to another; returns the name of the bridge's end."""
        outside = f"{self.port}x{next(_numbers) % 1000}"
        network.add_link(
            netns=self.name, bridge=bridge or self.bridge, interface=interface, address=address, outside=outside
        )
        return outside

    def add_device(self, interface: str, kind: str, *options: str, address: str | None = None) -> None:
        """A device made of others: bridge, vlan, bond, macvlan. BedError if this machine's kernel lacks the kind."""
        run(["ip", "-n", self.name, "link", "add", *options, "name", interface, "type", *kind.split()])
        if address:
            run(["ip", "-n", self.name, "addr", "add", address, "dev", interface])
        run(["ip", "-n", self.name, "link", "set", interface, "up"])

    def rename_interface(self, name: str) -> None:
        """Give the node's card another name, keeping its address."""
        for words in (["down"], ["name", name]):
            run(["ip", "-n", self.name, "link", "set", self.interface, *words])
        run(["ip", "-n", self.name, "link", "set", name, "up"])
        self.interface = name

    def bytes_moved(self) -> int:
        """Bytes that the node's card has sent and received."""
        return network.bytes_moved(self.name, self.interface)

    def clear(self) -> None:
        """Back to a node nobody used: no containers, no volumes, no faults; the engine runs."""
        self.restore()
        if self.engine.first_pid is None:
            self.start_engine()
        for container in self.engine.client.containers.list(all=True):
            container.remove(force=True, v=True)
        for volume in self.engine.client.volumes.list():
            volume.remove(force=True)
        shutil.rmtree(self.folders, ignore_errors=True)
        self.stacks.clear()


@contextlib.contextmanager
def fake_gpu_hook(node: Node, script: str) -> Iterator[Path]:
    """FAKE: a stand-in for NVIDIA's runtime hook, which no machine without GPUs has; the engine restarts around it.

    Docker looks for a program of this name on its PATH when it starts, and runs it before each container with a GPU
    request. Yields the folder in which the script may leave what it saw.
    """
    hook = node.engine.home / "bin" / "nvidia-container-runtime-hook"
    node.stop_engine()
    hook.write_text(script)
    hook.chmod(0o755)
    node.start_engine()
    try:
        yield hook.parent
    finally:
        hook.unlink()
        node.stop_engine()
        node.start_engine()
