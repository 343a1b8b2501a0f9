"""Every name of torch that this project uses and torch does not document, with what is done where it is gone.

Nothing here imports torch, and nothing is decided by torch's version: a name is looked for. A test fails when one is
gone from the torch that the tests run with.
"""

from dataclasses import dataclass
from importlib import import_module

ELASTIC = "torch.distributed.elastic.multiprocessing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    module: str
    path: str
    """Attributes from the module on, with dots."""
    used_for: str
    optional: bool = False
    """Only some builds or versions of torch have it."""


ENGINE = (
    Name(module=ELASTIC, path="SubprocessContext", used_for="elastic.py puts its subclass there"),
    Name(module=f"{ELASTIC}.api", path="SubprocessContext._start", used_for="elastic.py keeps signals away meanwhile"),
    Name(module=f"{ELASTIC}.api", path="SubprocessContext._poll", used_for="elastic.py keeps signals away meanwhile"),
    Name(module=f"{ELASTIC}.api", path="SubprocessContext._close", used_for="elastic.py tells of it, sets the grace"),
    Name(
        module=f"{ELASTIC}.subprocess_handler.handlers",
        path="SubprocessHandler._popen",
        used_for="elastic.py puts its subclass there, which forks workers from the preloaded process",
    ),
    Name(module=f"{ELASTIC}.api", path="TailLog", used_for="elastic.py puts its own into SubprocessContext._tail_logs"),
    Name(
        module="torch.distributed.launcher.api",
        path="LocalElasticAgent",
        used_for="elastic.py lets it wait for the other nodes as long as they run",
    ),
    Name(module=f"{ELASTIC}.api", path="DefaultLogsSpecs", used_for="elastic.py: folders in /tmp on a full disk"),
)
"""Without one of these torchrun runs as torch has it: failures are told late, and workers load torch themselves."""

WORKER = (
    Name(
        module="torch.distributed.distributed_c10d",
        path="_default_pg_init_method",
        used_for="worker.py tells of ranks that never joined a group; without it that is not told",
    ),
)

WATCHDOG = (
    Name(
        module="torch.distributed.distributed_c10d",
        path="_get_default_group",
        used_for="watchdog.py counts collectives; without it a rank's place alone tells",
    ),
    Name(
        module="torch._C._distributed_c10d",
        path="ProcessGroup._get_sequence_number_for_group",
        used_for="watchdog.py counts collectives; without it a rank's place alone tells",
    ),
    Name(
        module="torch._C._distributed_c10d",
        path="_dump_fr_trace_json",
        used_for="watchdog.py names collectives; without it a stalled rank is told without its collective",
    ),
    Name(
        module="torch._C._distributed_c10d",
        path="_dump_nccl_trace_json",
        used_for="watchdog.py names NCCL's collectives",
        optional=True,
    ),
)


def missing(names: tuple[Name, ...]) -> tuple[Name, ...]:
    """Those that this torch lacks; imports torch."""
    return tuple(name for name in names if not name.optional and not _exists(name))


def _exists(name: Name) -> bool:
    try:
        found: object = import_module(name.module)
        for attribute in name.path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError):
        return False
    return True
