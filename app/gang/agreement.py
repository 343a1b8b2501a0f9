"""What the nodes compare before they start, and how a difference is told."""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.config.project import PROJECT, VERSION
from app.plan import Plan

Facts = Mapping[str, str]

TOLERATED = {"cuda driver", "gpus", "hcas", "link layer", "mtu", "python", "torchrun-compose"}
"""Facts that may differ for a good reason: said, not refused. So may times, whatever tunes NCCL, and packages."""
MOST_LINES, MOST_VALUES = 12, 8
"""Of a table: two images can differ in hundreds of packages, 1,000 nodes in as many values of one fact."""
FIXES = {
    "NODES": "Copy one .env to all nodes.",
    "NNODES": "Copy one .env to all nodes.",
    "NPROC_PER_NODE": "Set NPROC_PER_NODE to one number on all nodes.",
    "torch": "Use the same image on all nodes.",
    "content": "Copy the script to all nodes, or use the same image.",
    "package": "Use the same image on all nodes: build it once, then `docker save IMAGE | ssh NODE docker load`.",
    "torchrun-compose": "Use the same image, or the same checkout of torchrun-compose, on all nodes.",
}


def gather(plan: Plan, root: Path = Path("/")) -> dict[str, str]:
    """This node's facts, as texts by name. Reads a few small files below `root`, imports nothing of torch."""
    ports = sorted((root / "sys/class/infiniband").glob("*/ports/*"))
    active = [port for port in ports if _read(port / "state").startswith("4:")]
    found = {
        "cuda driver": _driver(root),
        "hcas": str(len(active)) if active else "",
        "link layer": ",".join(sorted({_read(port / "link_layer") for port in active})),
        "mtu": _read(root / "sys/class/net" / plan.network.interface / "mtu"),
        "content of module": module_digest(plan.script.command, (plan.script.env.get("PYTHONPATH", "")).split(":")),
        "torchrun-compose": f"{VERSION} ({_digest(sorted(PROJECT.glob('app/**/*.py')), PROJECT)})",
    }
    return {**{name: value for name, value in found.items() if value}, **dict(plan.equal)}


def host_id(root: Path = Path("/")) -> str:
    """Which machine, short enough to print: its name and the id of its boot, which no other machine has."""
    return f"{os.uname().nodename}, boot {_read(root / 'proc/sys/kernel/random/boot_id')[:8]}"


def module_digest(command: Sequence[str], python_path: Sequence[str]) -> str:
    """A digest of the module that `-m` names: its file, or all Python files of its package; "" if it is not found."""
    if command[:1] != ("-m",) or len(command) < 2:
        return ""
    for folder in [".", *filter(None, python_path), *filter(None, sys.path)]:
        place = Path(folder, *command[1].split("."))
        files = sorted(place.glob("**/*.py")) if (place / "__main__.py").is_file() else [place.with_suffix(".py")]
        if all(file.is_file() for file in files):
            return _digest(files, Path(folder))
    return ""


def _digest(files: Sequence[Path], folder: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def differences(facts: Mapping[int, Facts]) -> tuple[str, str]:
    """Compares the nodes' facts by rank: (what must not differ, what may), each a small table or ""."""
    if len({known.get("packages") for known in facts.values()}) > 1:
        facts = {rank: _by_package(known) for rank, known in facts.items()}
    names = sorted({name for known in facts.values() for name in known})
    # Most names are equal everywhere, and 1,000 nodes must not cost 1,000 tables.
    uneven = [name for name in names if len({known.get(name) for known in facts.values()}) > 1]
    wrong = [name for name in uneven if not _tolerated(name)]
    return _table(facts, wrong), _table(facts, [name for name in uneven if name not in wrong])


def _by_package(known: Facts) -> Facts:
    """One fact per installed package in place of the list of all."""
    packages = (entry.partition("-") for entry in known.get("packages", "").split())
    rest = {name: value for name, value in known.items() if name != "packages"}
    return rest | {f"package {name}": version for name, _, version in packages}


def _tolerated(name: str) -> bool:
    return (
        name in TOLERATED
        or name.startswith(("NCCL_", "package "))
        or name.endswith(("_TIMEOUT", "_GRACE", "_RESTARTS"))
    )


def _table(facts: Mapping[int, Facts], names: Sequence[str]) -> str:
    shown = names[:MOST_LINES]
    width = max((len(name) for name in shown), default=0)
    lines = [f"  {name:{width}}  {'   '.join(_by_value(facts, name))}" for name in shown]
    lines += [f"  and {len(names) - len(shown)} more"] if len(names) > len(shown) else []
    fixes = dict.fromkeys(FIXES[key] for name in names for key in FIXES if name.partition(" ")[0] == key)
    return "\n".join([*lines, *(f"  {text}" for text in fixes)])


def _by_value(facts: Mapping[int, Facts], name: str) -> list[str]:
    holders: dict[str, list[int]] = {}
    for rank, known in sorted(facts.items()):
        holders.setdefault(known.get(name, "-")[:80], []).append(rank)
    told = [f"{value} ({told_nodes(ranks)})" for value, ranks in [*holders.items()][:MOST_VALUES]]
    return [*told, f"and {len(holders) - MOST_VALUES} other values"] if len(holders) > MOST_VALUES else told


def told_nodes(ranks: Sequence[int]) -> str:
    """`node 3`, `nodes 0, 1`, at most six of them."""
    shown = ", ".join(map(str, ranks[:6])) + (f" and {len(ranks) - 6} more" if len(ranks) > 6 else "")
    return f"node {shown}" if len(ranks) == 1 else f"nodes {shown}"


def _driver(root: Path) -> str:
    words = _read(root / "proc/driver/nvidia/version").split()
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
