"""`up`, `stop`, `restart`, `down`: the stacks of all hosts as one."""

import asyncio
import re
import time
from collections.abc import Sequence

from app.config.console import say
from app.config.options import Parser
from app.config.table import columns
from app.fleet.hosts import Desk, Host
from app.fleet.logs import Line, show
from app.fleet.push import bring
from app.fleet.push import options as push_options
from app.fleet.remote import complaints, everywhere
from app.fleet.stack import compose, in_stack

READY = re.compile(r"all \d+ nodes connected")
"""What the launcher says when the roll call is over."""
STARTED = 180.0
"""Seconds for `docker compose up`; a registry's image may have to come first."""
SLACK = 60.0
"""Seconds over the stack's own grace until a stop is given up."""
# One desk at a time starts and stops a host's stack.
ALONE = "exec 9> .desk/lock && flock 9 || exit 1\n"
STATE = "{{.State}} ({{.Status}})"
GO_ON = "`torchrun-compose logs --follow` shows it, `torchrun-compose stop` ends it"


def up(desk: Desk, arguments: Sequence[str]) -> int:
    """0 when the roll call is over on every host; with `--attach`, the worst exit code of the nodes."""
    wanted = push_options("up", arguments, attach=True)
    failed = asyncio.run(bring(desk, wanted.image, build=wanted.build))
    if failed:
        say(f"not started: {len(failed)} of {len(desk.hosts)} hosts cannot take part")
        return 1
    try:
        return asyncio.run(_start(desk, attach=wanted.attach))
    except KeyboardInterrupt:
        say(f"detached; the job goes on: {GO_ON}")
        return 0


async def _start(desk: Desk, *, attach: bool) -> int:
    began, clock = time.time(), time.monotonic()
    script = f"{ALONE}exec docker compose --ansi never up --detach --no-build trainer"
    results = await everywhere(desk, lambda host: in_stack(desk, host, script), what="its start", deadline=STARTED)
    if complaints(results):
        say("the others wait for START_TIMEOUT; `torchrun-compose stop` ends them at once")
        return 1
    running = all(re.search(r" Running$", each.err, re.MULTILINE) for each in results)
    if running:
        say(f"runs already, nothing was started: {GO_ON}")
        if not attach:
            return 0
    else:
        say(f"started on {len(results)} hosts in {time.monotonic() - clock:.1f} s")
    arrived: set[Host] = set()

    def over(line: Line) -> bool:
        before = len(arrived) == len(desk.hosts)
        if line.rank is not None:
            # A rank speaks only after all have met.
            arrived.update(desk.hosts)
        elif READY.match(line.text):
            arrived.add(line.host)
        if len(arrived) == len(desk.hosts) and not before:
            say(f"the roll call is over {time.time() - began:.1f} s after the start")
        return not attach and len(arrived) == len(desk.hosts)

    await show(desk, follow=True, since=began, until=over)
    if not attach and len(arrived) == len(desk.hosts):
        say(f"the job runs: {GO_ON}")
        return 0
    return await _ended(desk)


async def _ended(desk: Desk) -> int:
    """The worst exit code of the trainers, which have ended."""
    words = ("ps", "--all", "--format", "{{.ExitCode}}", "trainer")
    results = await everywhere(desk, lambda host: compose(desk, host, *words))
    codes = [int(each.text) if re.fullmatch(r"\d+", each.text.strip()) else 1 for each in results]
    say("ended: " + ", ".join(f"{host.name} with {code}" for host, code in zip(desk.hosts, codes, strict=True)))
    return max(codes)


def stop(desk: Desk, arguments: Sequence[str]) -> int:
    """Stops all stacks, each after its last checkpoint."""
    Parser(prog="stop", description="Stops the job on all hosts, after a checkpoint.").read(arguments)
    return asyncio.run(_all(desk, "stop"))


def down(desk: Desk, arguments: Sequence[str]) -> int:
    """Stops and removes the containers; results stay."""
    Parser(prog="down", description="Stops the job and removes its containers; results stay.").read(arguments)
    return asyncio.run(_all(desk, "down"))


def restart(desk: Desk, arguments: Sequence[str]) -> int:
    """Stops all, then starts all: never one by one."""
    Parser(prog="restart", description="Stops the job on all hosts, then starts it on all.").read(arguments)
    code = asyncio.run(_all(desk, "stop"))
    return code or asyncio.run(_start(desk, attach=False))


async def _all(desk: Desk, verb: str) -> int:
    """One compose command on all hosts at once, and how each stands after it."""
    grace = desk.settings.stop_grace_period.value or 0.0
    script = (
        f"{ALONE}docker compose --ansi never {verb} && docker compose --ansi never ps --all --format '{STATE}' trainer"
    )
    results = await everywhere(desk, lambda host: in_stack(desk, host, script), what=verb, deadline=grace + SLACK)
    rows = [(each.host.name, each.text.strip() or ("?" if each.failure else "gone")) for each in results]
    print("\n".join(columns(rows)))
    return int(bool(complaints(results)))
