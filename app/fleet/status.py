"""`status`, `stacks` and `notify` on all nodes: what their launchers tell (app/supervise/status.py), in one table."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.config.errors import UserError, printable
from app.config.options import Parser
from app.config.table import columns
from app.fleet.hosts import Desk, Host
from app.fleet.remote import Result, complaints, everywhere
from app.fleet.stack import compose, run_trainer

ENTRYPOINT = "/opt/torchrun-compose/entrypoint.py"
WAYS = ("in", "out")
DEADLINE, STACKS, NOTIFY = 15.0, 30.0, 120.0
HEAD = ("host", "node", "state", "round", "restarts", "progress", "loss", "tokens/s", "GPU", "memory", "heat", *WAYS)
WORDS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """What one host told."""

    host: Host
    status: Mapping[str, Any] | None
    why: str = ""
    """Why there is no status."""


async def look(desk: Desk) -> list[NodeStatus]:
    """All hosts at once."""
    results = await everywhere(desk, lambda host: _asked(desk, host, "status", "--json"), deadline=DEADLINE)
    return [_seen(each) for each in results]


def _asked(desk: Desk, host: Host, *words: str) -> str:
    return compose(desk, host, "exec", "--no-TTY", "trainer", "python", ENTRYPOINT, *words)


def _seen(result: Result) -> NodeStatus:
    found = _decoded(result)
    if found:
        return NodeStatus(host=result.host, status=found[0])
    stopped = found == [] or "is not running" in result.err
    why = "nothing runs" if stopped or result.failure is None else result.failure.message
    return NodeStatus(host=result.host, status=None, why=why)


def _decoded(result: Result) -> list[dict[str, Any]] | None:
    """The list that a node printed, its texts fit for this terminal; None for anything else."""
    try:
        found = _clean(json.loads(result.out))
    except ValueError:
        return None
    return found if isinstance(found, list) and all(isinstance(each, dict) for each in found) else None


def _clean(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, str):
        return "\n".join(map(printable, value.splitlines()))
    if isinstance(value, list):
        return [_clean(each) for each in value]
    return {_clean(name): _clean(each) for name, each in value.items()} if isinstance(value, dict) else value


def status(desk: Desk, arguments: Sequence[str]) -> int:
    """0 when a launcher runs on every host, 1 otherwise."""
    parser = Parser(prog="status", description="What the job does on every node. 0 when it runs on all, 1 otherwise.")
    parser.add_argument("--json", action="store_true", help="for programs: a list of hosts")
    wanted = parser.read(arguments)
    seen = asyncio.run(look(desk))
    print(json.dumps(as_data(seen)) if wanted.json else "\n".join(table(seen)))
    return int(any(each.status is None for each in seen))


def as_data(seen: Sequence[NodeStatus]) -> list[dict[str, object]]:
    return [{"host": each.host.name, "status": each.status, "why": each.why} for each in seen]


def table(seen: Sequence[NodeStatus]) -> list[str]:
    """A row for each node, its last words, and what is wrong."""
    rows = [row(each) for each in seen]
    lines = columns([HEAD, *rows])
    hangs = dict.fromkeys(each.status["hang"] for each in seen if each.status and each.status["hang"])
    lines += [f"hangs: {text}" for text in hangs]
    lines += [f"{each.host.name}: {each.why}" for each in seen if each.why]
    told = [(each.host.name, each.status["last_words"][:WORDS]) for each in seen if each.status]
    return [*lines, *columns([(f"{name} |", words) for name, words in told if words])]


def row(seen: NodeStatus) -> tuple[str, ...]:
    """Cells below HEAD; of a host without a job the first alone."""
    if seen.status is None:
        return (seen.host.name, "-", "no job", *[""] * (len(HEAD) - 3))
    status = seen.status
    gpus, figures = status["gpus"], status["figures"]
    used, total = _total(gpus, "used"), _total(gpus, "total")
    rates = [*status["bytes_per_second"].values()]
    # The clocks of the desk and of the node may differ.
    age = max(0, status["time"] - status["progress_time"])
    return (
        seen.host.name,
        f"{status['node']} of {status['nodes']}",
        "hangs" if status["hang"] else status["state"],
        str(status["round"]),
        ", ".join(f"{count} {cause}" for cause, count in status["restarts"].items()) or "0",
        f"{status['progress'][:24]}, {age:.0f} s ago" if status["progress"] else "-",
        f"{figures['loss']:.4g}" if "loss" in figures else "-",
        f"{figures['tokens_per_second']:,.0f}" if "tokens_per_second" in figures else "-",
        _percent(busy(status)),
        _percent(used / total if used is not None and total else None),
        f"{max((gpu['temperature'] for gpu in gpus if gpu['temperature'] is not None), default=0) or '-'}",
        *(f"{sum(rate[way] for rate in rates) / 1e6:,.1f} MB/s" for way in (0, 1)),
    )


def busy(status: Mapping[str, Any]) -> float | None:
    """The mean load of a node's GPUs."""
    loads = [gpu["busy"] for gpu in status["gpus"] if gpu["busy"] is not None]
    return sum(loads) / len(loads) if loads else None


def _total(gpus: Sequence[Mapping[str, Any]], name: str) -> int | None:
    values = [gpu[name] for gpu in gpus if gpu[name] is not None]
    return sum(values) if values else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def stacks(desk: Desk, arguments: Sequence[str]) -> int:
    """0 when every rank of every host answered, 1 otherwise."""
    about = "Where every rank of every node is; nothing is stopped for it. 0 when each answered, 1 otherwise."
    parser = Parser(prog="stacks", description=about)
    parser.add_argument("--json", action="store_true", help="for programs: a list of ranks")
    wanted = parser.read(arguments)
    results = asyncio.run(
        everywhere(desk, lambda host: _asked(desk, host, "stacks", "--json"), what="stacks", deadline=STACKS)
    )
    # A rank that does not answer is in the list, and makes the exit code 1.
    found = [(each, _decoded(each)) for each in results]
    complaints(each for each, ranks in found if not ranks)
    told = [{"host": each.host.name, **rank} for each, ranks in found for rank in ranks or ()]
    print(json.dumps(told) if wanted.json else together(told))
    return int(any(each.code for each in results))


def together(told: Sequence[Mapping[str, Any]]) -> str:
    """Ranks with the same stacks as one paragraph."""
    groups: dict[str, list[str]] = {}
    for each in told:
        groups.setdefault(each["text"], []).append(f"rank {each['rank']} ({each['host']})")
    return "\n\n".join(f"{', '.join(ranks)} {text}" for text, ranks in groups.items())


def notify(desk: Desk, arguments: Sequence[str]) -> int:
    """Lets node 0 send a test message; `--on` names another."""
    parser = Parser(prog="notify", description="Tries the services of NOTIFY, from node 0 (--on HOST: another).")
    parser.add_argument("--test", action="store_true", help="send one message to each service")
    if not parser.read(arguments).test:
        raise UserError("notify sends nothing by itself: `notify --test` tries the services of NOTIFY.")
    first = desk.only([desk.hosts[0].name])
    results = asyncio.run(
        everywhere(first, lambda host: run_trainer(first, host, "notify", "--test"), what="notify", deadline=NOTIFY)
    )
    print(results[0].text or results[0].err)
    return results[0].code
