"""The table of bad days in docs/troubleshooting.md: for each, what plain torchrun prints and what we print.

BAD_DAY_TABLE=docs/troubleshooting.md pytest tests/cluster      # writes the cells of every test that runs
"""

import contextlib
import io
import os
import re
import tarfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.cluster.faults import seconds
from tests.testbed import BedError, Node, Stack
from tests.testbed.image import IMAGE
from tests.testbed.shell import PROJECT

TABLE = os.environ.get("BAD_DAY_TABLE", "")
"""The page to write; without it the cells are only printed, and plain torchrun is not run."""
BEGIN, END = "<!-- bad days: written by `make bad-days` -->", "<!-- end of the bad days -->"
HEAD = "| what is wrong | plain torchrun prints | after | we print | after |\n|---|---|---|---|---|"
LONGEST = 340
"""Characters of a cell: the longest of our sentences with its cure."""
SCRIPTS = PROJECT / "tests/scripts"
FULL = 'volumes: {runs: {driver_opts: {type: tmpfs, device: tmpfs, o: "size=24m,uid=1000"}}}\n'
"""One more compose file: a disk of 24 MB for everything that a node writes."""
SCENARIOS: Mapping[str, str] = {
    "one way": "a firewall drops node 0's connections to node 1, not those back",
    "pair": "nodes 1 and 2 of three cannot reach each other",
    "slow link": "one node's link runs at a tenth of its speed",
    "mtu": "MTU 1400 on one node, 1500 on the other",
    "wrong nic": "`GLOO_SOCKET_IFNAME=lo` in the settings of node 0",
    "127.0.1.1": "each node's own name is 127.0.1.1 in its /etc/hosts",
    "twin": "two of three nodes have the same node rank",
    "image": "one node has another image, with a package more",
    "shm": "/dev/shm of 32 MB on one node",
    "disk": "the disk of the checkpoints is full on one node",
    "not shared": "FSDP2, and each node has a checkpoint folder of its own",
    "exception": "a Python exception on one rank of four",
    "memory": "one worker takes more memory than its container may have",
    "hang": "one rank sleeps where the others enter a collective",
    "other collective": "one rank enters another collective than the others",
    "slow rank": "one rank is slower than the others",
    "port": "MASTER_PORT is taken on node 0",
    "token": "another cluster token on one node",
    "no script": "`TRAIN_SCRIPT` is missing on one node",
    "import": "an import that fails on one node only",
}
"""In the order of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Four cells of Markdown; "" where nobody has filled it yet."""

    plain: str = ""
    plain_after: str = ""
    ours: str = ""
    ours_after: str = ""


def we_print(scenario: str, seconds: float, said: str, *, by: str = "") -> None:
    """Fills our side of a row: `said` after so many seconds, by the command `by` if not by the launch itself."""
    _fill(scenario, ours=code(said), ours_after=f"{seconds:.1f} s" + f" ({by})" * bool(by))


def torchrun_prints(scenario: str, said: str, after: str) -> None:
    """Fills plain torchrun's side."""
    _fill(scenario, plain=said, plain_after=after)


def stamped(stack: Stack) -> list[tuple[float, str]]:
    """All that a stack has said: (seconds since the epoch, line)."""
    log = stack.container().logs(timestamps=True).decode(errors="replace")
    return [(seconds(stamp), said.strip()) for stamp, _, said in (line.partition(" ") for line in log.splitlines())]


def fault_at(stacks: Sequence[Stack], deadline: float = 60) -> float:
    """When a script of tests/scripts first printed FAULT, just before it went wrong. Raises BedError."""
    until = time.monotonic() + deadline
    while not (found := [at for stack in stacks for at, line in stamped(stack) if line.endswith("FAULT")]):
        if time.monotonic() > until:
            raise BedError(f"no script has printed FAULT within {deadline:g} s:\n{stacks[-1].tail()}")
        time.sleep(0.3)
    return min(found)


@contextlib.contextmanager
def another_image(node: Node) -> Iterator[str]:
    """The name of an image that is the project's own with a package more, and was built from another checkout."""
    files = {
        "opt/venv/lib/python3.11/site-packages/einops-0.8.1.dist-info/METADATA": b"Name: einops\nVersion: 0.8.1\n",
        "opt/torchrun-compose/app/config/exitcodes.py": b'"""Another checkout."""\n',
    }
    files["opt/torchrun-compose/app/config/exitcodes.py"] += (PROJECT / "app/config/exitcodes.py").read_bytes()
    changed = io.BytesIO()
    with tarfile.open(fileobj=changed, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))
    container = node.engine.client.containers.create(IMAGE)
    container.put_archive("/", changed.getvalue())
    container.commit("torchrun-compose", "another")
    container.remove()
    try:
        yield "torchrun-compose:another"
    finally:
        for stack in node.stacks:
            stack.remove()
        node.engine.client.images.remove("torchrun-compose:another")


def told(said: Sequence[str]) -> str:
    """One cell for what several nodes said, in rank order."""
    if len(set(said)) == 1:
        return said[0]
    return "<br>".join(f"node {rank}: {text}" for rank, text in enumerate(said))


def code(said: str) -> str:
    """A cell with one line of output."""
    line = re.sub(r"\s+", " ", said).strip().replace("|", "/").replace("`", "'")
    return f"`{textwrap.shorten(line, LONGEST, placeholder=' ...')}`"


def _fill(scenario: str, **cells: str) -> None:
    name = SCENARIOS[scenario]
    print(f"\n{name}: {cells}", flush=True)
    if TABLE:
        page = Path(TABLE)
        text = page.read_text(encoding="utf-8")
        rows = read_rows(text)
        rows[scenario] = replace(rows[scenario], **cells)
        page.write_text(with_rows(text, rows), encoding="utf-8")


def read_rows(page: str) -> dict[str, Row]:
    """All scenarios, with what the page holds of them. Raises ValueError where the page has no place for the table."""
    found = re.search(rf"{re.escape(BEGIN)}(.*?){re.escape(END)}", page, re.DOTALL)
    if not found:
        raise ValueError(f"the page needs a line {BEGIN!r} and below it a line {END!r}")
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()]
    known = {cells[0]: cells[1:] for cells in lines if len(cells) == 5}
    fields = ("plain", "plain_after", "ours", "ours_after")
    return {
        key: Row(**dict(zip(fields, known[name], strict=True))) if name in known else Row()
        for key, name in SCENARIOS.items()
    }


def with_rows(page: str, rows: Mapping[str, Row]) -> str:
    lines = [
        f"| {name} | {row.plain} | {row.plain_after} | {row.ours} | {row.ours_after} |"
        for name, row in ((name, rows[key]) for key, name in SCENARIOS.items())
    ]
    table = "\n".join([HEAD, *lines])
    return re.sub(
        rf"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page, flags=re.DOTALL
    )
