"""What must be the same on all nodes, for the roll call to compare."""

from collections import Counter

from app.config.settings import Settings
from app.host import Host
from app.plan.node_list import NodeList
from app.plan.parts import Script, Workers

SETTINGS = (
    "MASTER_PORT",
    "RUN_NAME",
    "START_TIMEOUT",
    "REJOIN_TIMEOUT",
    "HEARTBEAT_TIMEOUT",
    "STOP_GRACE",
    "MAX_RESTARTS",
    "CHECKPOINTS",
    "HANG_REPORT",
    "HANG_TIMEOUT",
    "MIN_NODES",
    # NCCL: each of these must be set on all nodes or on none (NCCL user guide, environment variables).
    "NCCL_NET",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_CROSS_NIC",
    "NCCL_BUFFSIZE",
    "NCCL_MIN_NCHANNELS",
    "NCCL_MAX_NCHANNELS",
)


def must_be_equal(
    settings: Settings,
    host: Host,
    member: NodeList,
    workers: Workers,
    transport: str,
    script: Script,
    control_port: int,
) -> tuple[tuple[str, str], ...]:
    """Pairs of name and value, sorted; what belongs to one node (rank, interface, HCA, paths) is not among them."""
    found = {name: settings.text(name) for name in SETTINGS if settings.text(name)}
    found["NNODES"] = str(len(member.addresses))
    if settings.is_set("NODES"):
        found["NODES"] = ",".join(member.names)
    found["NPROC_PER_NODE"] = str(workers.nproc)
    found["BACKEND"] = workers.backend
    found["CONTROL_PORT"] = str(control_port)
    if workers.backend == "nccl":
        # NCCL fails, or falls back, when one node talks InfiniBand and another RoCE or sockets.
        found["transport of NCCL"] = transport
        models = Counter(gpu.name for gpu in host.gpus.visible)
        found["gpus"] = ", ".join(f"{number} x {name}" for name, number in sorted(models.items()))
    found["TRAIN_SCRIPT"] = " ".join(script.command)
    found |= {
        f"content of {path}": seen.digest for path, seen in host.files.items() if path in script.command and seen.digest
    }
    found |= {"python": host.python.rpartition(".")[0], **host.packages}
    return tuple(sorted(found.items()))
