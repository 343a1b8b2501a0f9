"""Rank and size from the variables of a scheduler, for an image that also runs under Slurm, Kubernetes or Open MPI."""

import re
from dataclasses import dataclass
from itertools import product

from app.config.envfile import Value
from app.config.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """What a scheduler's variables say; absent parts must come from NNODES and MASTER_ADDR."""

    scheduler: str
    rank: Value
    nnodes: Value | None = None
    master: Value | None = None
    wrong: str = ""
    """Why this process cannot be the one launcher of its node."""


def scheduled(settings: Settings) -> Scheduled | None:
    """The first scheduler whose variables are complete. Sources: sbatch(1) OUTPUT ENVIRONMENT VARIABLES, Kubernetes
    "Indexed Job", Open MPI mpirun(1) "Exported Environment Variables"."""
    return _slurm(settings) or _kubernetes(settings) or _open_mpi(settings)


def _named(settings: Settings, *names: str) -> Value | None:
    for name in names:
        value = settings.values.get(name)
        if value is not None:
            return Value(text=value.text, source=name)
    return None


def _whole(value: Value | None) -> Value | None:
    return value if value is not None and re.fullmatch(r"[0-9]{1,6}", value.text) else None


def _slurm(settings: Settings) -> Scheduled | None:
    rank = _whole(_named(settings, "SLURM_NODEID"))
    nodelist = _named(settings, "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if rank is None or nodelist is None:
        return None
    names = expand_nodelist(nodelist.text)
    local_id = settings.text("SLURM_LOCALID")
    return Scheduled(
        scheduler="Slurm",
        rank=rank,
        nnodes=_whole(_named(settings, "SLURM_NNODES", "SLURM_JOB_NUM_NODES"))
        or Value(text=str(len(names)), source=nodelist.source),
        master=Value(text=names[0], source=nodelist.source) if names else None,
        wrong=f"SLURM_LOCALID={local_id}: start one launcher per node (srun --ntasks-per-node=1)"
        if local_id not in ("", "0")
        else "",
    )


def _kubernetes(settings: Settings) -> Scheduled | None:
    rank = _whole(_named(settings, "JOB_COMPLETION_INDEX"))
    return None if rank is None else Scheduled(scheduler="Kubernetes", rank=rank)


def _open_mpi(settings: Settings) -> Scheduled | None:
    rank, size, per_node = (
        _whole(_named(settings, f"OMPI_COMM_WORLD_{part}")) for part in ("RANK", "SIZE", "LOCAL_SIZE")
    )
    if rank is None or size is None:
        return None
    several = per_node is not None and per_node.text != "1"
    wrong = f"OMPI_COMM_WORLD_LOCAL_SIZE={per_node.text if per_node else ''}: start one launcher per node (-npernode 1)"
    return Scheduled(scheduler="Open MPI", rank=rank, nnodes=size, wrong=wrong if several else "")


def expand_nodelist(text: str) -> tuple[str, ...]:
    """Slurm's compressed host list, in its order: `n[01-03,07],gpu-a[1-2]b` is n01, n02, n03, n07, gpu-a1b, gpu-a2b."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        parts = [
            _range(part[1:-1]) if part.startswith("[") else [part] for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", item)
        ]
        # A list of a hundred thousand nodes is a mistake, not a cluster.
        for combination in product(*parts):
            names.append("".join(combination))
            if len(names) > 100_000:
                return ()
    return tuple(names)


def _range(text: str) -> list[str]:
    found: list[str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not dash or not first.isdigit() or not last.isdigit() or int(last) - int(first) > 100_000:
            found.append(part)
        else:
            found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found
