"""What must be the same on all nodes, for the roll call to compare."""

from collections import Counter
from typing import Any

from app.config.settings import TABLE, Settings
from app.config.values import Value
from app.host import Host
from app.plan.node_list import NodeList
from app.plan.parts import LocalWorkers, Script

LIBRARY = (
    "NCCL_NET",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_CROSS_NIC",
    "NCCL_BUFFSIZE",
    "NCCL_MIN_NCHANNELS",
    "NCCL_MAX_NCHANNELS",
)
"""Each must be set on all nodes or on none (NCCL user guide, environment variables)."""


def must_be_equal(
    settings: Settings,
    host: Host,
    nodes: NodeList,
    workers: LocalWorkers,
    transport: str,
    script: Script,
    control_port: int,
) -> tuple[tuple[str, str], ...]:
    """Pairs of name and value, sorted: what the settings of the cluster come to on this node, and the software.

    What belongs to one node (rank, interface, HCA, paths) is not among them.
    """
    found = {name: settings.text(name) for name in LIBRARY}
    found |= {each.name: _text(settings.of(each.name)) for each in TABLE if each.scope == "cluster"}
    found |= {
        "NODES": ",".join(nodes.names) if settings.nodes else "",
        "NNODES": str(len(nodes.addresses)),
        "NPROC_PER_NODE": str(workers.nproc),
        "BACKEND": workers.backend,
        "CONTROL_PORT": str(control_port),
        "TRAIN_SCRIPT": " ".join(script.command),
        "TRAIN_ARGS": "",  # in the command
        "python": host.python.rpartition(".")[0],
        **host.packages,
    }
    if workers.backend == "nccl":
        # NCCL fails, or falls back, when one node talks InfiniBand and another RoCE or sockets.
        found["transport of NCCL"] = transport
        models = Counter(gpu.name for gpu in host.gpus.visible)
        found["gpus"] = ", ".join(f"{number} x {name}" for name, number in sorted(models.items()))
    for path, seen in host.files.items():
        if path in script.command:
            found[f"content of {path}"] = seen.digest
    return tuple(sorted((name, text) for name, text in found.items() if text))


def _text(value: Value[Any] | None) -> str:
    return "" if value is None else value.text
