"""`check`: can every host be used? One row each; what is missing has a sentence and the command that installs it."""

import asyncio
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from app.config.options import Parser
from app.config.problems import Problem, Severity, texts
from app.config.table import columns
from app.fleet.hosts import Desk, Host
from app.fleet.image import image_name
from app.fleet.remote import FAILURES, Result, clock_ahead, disconnect, everywhere, explain_failure

COMPOSE = (2, 24)
"""What compose.yaml needs."""
LEAST_FREE = 20
"""GB for the image and its layers."""
CLOCK = 1.0
"""Seconds that two clocks may differ."""
HEAD = ("host", "ssh", "arch", "Docker", "Compose", "toolkit", "GPUs", "free", "clock", "image")
ENGINE_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}
# Each line: name, exit code, first line of what was said. `docker info` is asked once, for it is slow.
PROBE = r"""
say() { n=$1; shift; t=$("$@" 2>&1); printf '%s\t%s\t%s\n' "$n" "$?" "$(printf %s "$t" | tr '\n\t' '; ')"; }
root() { df -Pk "$(docker info --format '{{.DockerRootDir}}' 2>/dev/null)" 2>/dev/null || df -Pk .; }
say time date +%s.%N
say arch uname -m
say docker docker version --format '{{.Server.Version}}'
say compose docker compose version --short
say runtimes docker info --format '{{range $k, $v := .Runtimes}}{{$k}} {{end}}'
say gpus nvidia-smi --query-gpu=name --format=csv,noheader
say disk root
say image docker image inspect --format '{{.Id}} {{.Architecture}}' IMAGE
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One host's row and what is wrong there."""

    host: Host
    cells: tuple[str, ...]
    problems: tuple[Problem, ...]


def check(desk: Desk, arguments: Sequence[str]) -> int:
    """0 when every host can be used, 1 when one cannot."""
    Parser(prog="check", description="Can every host be used? What is missing, and what installs it.").read(arguments)
    rows = asyncio.run(examine(desk))
    print("\n".join(columns([HEAD, *((each.host.name, *each.cells) for each in rows)])))
    found = [each for row in rows for each in row.problems]
    for each in found:
        print(f"{'warning' if each.severity == 'warning' else 'problem'}: {each.message}")
    return int(any(each.severity == "error" for each in found))


async def examine(desk: Desk) -> list[Checked]:
    """All hosts at once; those that do not answer are named by then."""
    results = await everywhere(desk, PROBE.replace("IMAGE", shlex.quote(image_name(desk))), deadline=20)
    rows = [checked(desk, each) for each in results]
    for row in rows:
        if any(each.id == "docker.permission" for each in row.problems):
            disconnect(row.host)
    return rows


def checked(desk: Desk, result: Result) -> Checked:
    """One host's row out of what it said."""
    host = result.host
    if result.failure is not None:
        return Checked(host=host, cells=("no",), problems=(result.failure,))
    said = {name: (int(code), text.strip()) for name, code, text in _fields(result.out.decode("utf-8", "replace"))}
    problems: list[Problem] = []
    for name in ("docker", "compose"):
        if said[name][0] and not problems:
            # Without Docker the lines after it say the same again.
            problems.append(explain_failure(host, *said[name]))
    if not said["compose"][0] and tuple(map(int, re.findall(r"\d+", said["compose"][1])[:2])) < COMPOSE:
        problems.append(_problem("compose-old", host, found=said["compose"][1], needed="{}.{}".format(*COMPOSE)))
    skew = max(0.0, abs(clock_ahead(result, said["time"][1])) - result.seconds / 2)
    if skew > CLOCK:
        problems.append(_problem("clock", host, "warning", skew=skew))
    free = _free(said["disk"][1])
    if free is not None and free < LEAST_FREE:
        problems.append(_problem("disk-low", host, "warning", free=free, least=LEAST_FREE))
    hardware = desk.settings.hardware
    wants = hardware is not None and hardware.value.startswith("nvidia")
    if wants and not said["docker"][0] and "nvidia" not in said["runtimes"][1]:
        problems.append(_problem("no-toolkit", host, hardware=hardware))
    machine, image = said["arch"][1], said["image"][1].partition(" ")[2]
    if not said["image"][0] and image and ENGINE_ARCH.get(machine, machine) != image:
        problems.append(_problem("other-arch", host, image=image, machine=machine))
    gpus = [name for name in said["gpus"][1].split(";") if name.strip()] if not said["gpus"][0] else []
    cells = (
        f"{result.seconds * 1000:.0f} ms",
        said["arch"][1],
        said["docker"][1] if not said["docker"][0] else "no",
        said["compose"][1] if not said["compose"][0] else "no",
        "yes" if re.search(r"\bnvidia\b", said["runtimes"][1]) else "no",
        f"{len(gpus)} x {gpus[0].strip()}" if gpus else "none",
        f"{free:.0f} GB" if free is not None else "?",
        f"{skew:.1f} s off" if skew > CLOCK else "ok",
        said["image"][1].partition(" ")[0].removeprefix("sha256:")[:12] if not said["image"][0] else "none yet",
    )
    return Checked(host=host, cells=cells, problems=tuple(problems))


def _fields(text: str) -> list[list[str]]:
    return [parts for line in text.splitlines() if len(parts := line.split("\t", 2)) == 3]


def _free(text: str) -> float | None:
    """GB that df's last line has left."""
    found = re.search(r"\s(\d+)\s+\d+%\s", text)
    return int(found[1]) / 1e6 if found else None


def _problem(name: str, host: Host, severity: Severity = "error", **values: object) -> Problem:
    text = texts(FAILURES)["check"][name]
    told = {"host": host.name, **values}
    return Problem(id=f"check.{name}", severity=severity, values=told, what=text["what"], fix=text["fix"])
