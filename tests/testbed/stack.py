"""A compose stack on one node: started by the Compose CLI, watched with the docker SDK."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docker.errors import NotFound
from docker.models.containers import Container

from tests.testbed.shell import PROJECT, BedError, run

if TYPE_CHECKING:
    from tests.testbed.engine import Engine

SERVICE = "trainer"
VOLUME = "torchrun-compose_runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a command on a node ended with."""

    code: int
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One compose project in a folder of its own, laid out as a user's checkout."""

    engine: Engine
    folder: Path
    project: str
    """"" for the name that compose.yaml gives it."""
    exports: Mapping[str, str]
    """What the user's shell would have set when compose was started."""

    def compose(self, *words: str, timeout: float = 120) -> str:
        """Run `docker compose WORDS` in the stack's folder. Raises BedError if it fails."""
        return run(self.command(*words), env=self.environment, cwd=self.folder, timeout=timeout)

    def command(self, *words: str) -> list[str]:
        """The same as an argument list."""
        named = ["--project-name", self.project] if self.project else []
        return ["docker", "compose", "--ansi", "never", *named, *words]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the compose command; PWD as a shell in the stack's folder has it."""
        return {**self.engine.environment, "PWD": str(self.folder), **self.exports}

    def container(self, service: str = SERVICE) -> Container:
        """The newest container of a service. Raises BedError if there is none."""
        labels = [f"com.docker.compose.project={self.project}", f"com.docker.compose.service={service}"]
        found = self.engine.client.containers.list(all=True, filters={"label": labels})
        if not found:
            raise BedError(f"{self.engine.name} has no container of {service}")
        return found[0]

    @property
    def attributes(self) -> dict[str, Any]:
        """What `docker inspect` says of the container."""
        return dict(self.container().attrs)

    @property
    def restarts(self) -> int:
        """How often the engine has started the container again."""
        return int(self.attributes["RestartCount"])

    @property
    def running(self) -> bool:
        return bool(self.attributes["State"]["Running"])

    def wait(self, deadline: float = 120) -> int:
        """The exit code, once the container has ended for good: not while its restart policy starts it again."""
        container, end = self.container(), time.monotonic() + deadline
        while time.monotonic() < end:
            container.reload()
            if container.status == "exited":
                return int(container.attrs["State"]["ExitCode"])
            time.sleep(0.1)
        raise BedError(f"{self.engine.name} did not end within {deadline:g} s; its log:\n{self.tail()}")

    def logs(self) -> str:
        """All that the container has said, over all its starts; stdout and stderr in order."""
        return self.container().logs(stdout=True, stderr=True).decode(errors="replace")

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.logs().splitlines()[-lines:])

    def wait_for(self, pattern: str, deadline: float = 60, *, times: int = 1) -> re.Match[str]:
        """The match of the `times`-th log line in which the regular expression is found, as soon as it is there."""
        end, gone = time.monotonic() + deadline, False
        while True:
            found = [match for line in self.logs().splitlines() if (match := re.search(pattern, line))]
            if len(found) >= times:
                return found[times - 1]
            if gone or time.monotonic() > end:
                ending = "ended" if gone else f"ran {deadline:g} s"
                raise BedError(f"{self.engine.name} {ending} without {pattern!r} in its log:\n{self.tail()}")
            # One more look after the end: the last lines may have come between the look and the end.
            gone = self.container().status == "exited"
            time.sleep(0.2)

    def processes(self) -> dict[int, str]:
        """Command lines of the container's processes by their pid on this machine."""
        identity = str(self.container().id)
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and identity in (entry / "cgroup").read_text():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
        return found

    def signal(self, pattern: str, number: int = signal.SIGKILL) -> int:
        """Signal the container's processes whose command line the regular expression matches; how many they were."""
        pids = [pid for pid, line in self.processes().items() if re.search(pattern, line)]
        for pid in pids:
            os.kill(pid, number)
        return len(pids)

    def kill(self, service: str = SERVICE) -> None:
        """SIGKILL to the whole container; like `docker kill`, this does not count as a failure to restart from."""
        self.container(service).kill()

    def stop(self, timeout: float = 120) -> None:
        """`docker compose stop`: SIGTERM, then the stack's grace."""
        self.compose("stop", timeout=timeout)

    def start(self) -> None:
        """`docker compose up -d` again, with the same settings."""
        self.compose("up", "--detach", timeout=120)

    @property
    def runs(self) -> Path:
        """Where this machine keeps the stack's /runs, for looks that must not wait for the engine."""
        return self.engine.data / "volumes" / VOLUME / "_data"

    def read(self, path: str) -> bytes:
        """A file of the container, also after its end. Raises BedError if it is not there."""
        return self.archive(path)[""]

    def list(self, path: str) -> tuple[str, ...]:
        """Names of the files below a folder of the container, also after its end."""
        return tuple(sorted(name for name in self.archive(path) if name))

    def archive(self, path: str) -> dict[str, bytes]:
        """Contents of a file ("") or of all files below a folder by their names in it."""
        try:
            chunks, _ = self.container().get_archive(path)
        except NotFound:
            raise BedError(f"{self.engine.name} has no {path} in its container") from None
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            files = {item.name: archive.extractfile(item) for item in archive if item.isfile()}
            # The archive's first part is the last part of the path.
            return {name.partition("/")[2]: file.read() for name, file in files.items() if file}

    def remove(self) -> None:
        """Remove the stack with its volumes."""
        try:
            for container in self.engine.client.containers.list(
                all=True, filters={"label": f"com.docker.compose.project={self.project}"}
            ):
                container.remove(force=True, v=True)
        except NotFound:
            return


def lay_out(folder: Path, env: Mapping[str, str], files: Mapping[str, str]) -> None:
    """A user's checkout as compose sees it: the real compose file, one .env, scripts in workspace/."""
    for name in ("workspace", "data", "wheels", "secrets"):
        (folder / name).mkdir(parents=True)
    shutil.copy(PROJECT / "compose.yaml", folder)
    shutil.copytree(PROJECT / "hardware", folder / "hardware")
    lines = [f"{name}={value}\n" for name, value in {"ENV_FILE": "./.env", **env}.items()]
    (folder / ".env").write_text("".join(lines))
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # The container's user is not root; the caller's umask may hide what it shall read.
    run(["chmod", "-R", "a+rX", str(folder)])
    run(["chown", "-R", "1000:1000", str(folder / "workspace")])
