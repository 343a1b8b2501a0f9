"""Rank and size from the variables of a scheduler, for an image that also runs under Slurm, Kubernetes or Open MPI."""

import re
from dataclasses import dataclass
from itertools import product

from app.config.settings import Settings
from app.config.values import Value, plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """What a scheduler's variables say; absent parts must come from NNODES and MASTER_ADDR."""

    scheduler: str
    rank: Value[int]
    nnodes: Value[int] | None = None
    master: Value[str] | None = None
    several: tuple[str, str] | None = None
    """What says that this process is not the one launcher of its node, and the option that starts one."""


def scheduled(settings: Settings) -> Scheduled | None:
    """The first scheduler whose variables are complete. Sources: sbatch(1) OUTPUT ENVIRONMENT VARIABLES, Kubernetes
    "Indexed Job", Open MPI mpirun(1) "Exported Environment Variables"."""
    return _slurm(settings) or _kubernetes(settings) or _open_mpi(settings)


def _number(settings: Settings, setting: str, *names: str) -> Value[int] | None:
    """What the first of the variables that is set says of one of our settings."""
    for name in names:
        text = settings.text(name)
        if text:
            whole = re.fullmatch(r"[0-9]{1,6}", text)
            return Value(name=setting, text=text, source=name, value=int(text)) if whole else None
    return None


def _slurm(settings: Settings) -> Scheduled | None:
    rank = _number(settings, "NODE_RANK", "SLURM_NODEID")
    source = next((name for name in ("SLURM_JOB_NODELIST", "SLURM_NODELIST") if settings.is_set(name)), None)
    if rank is None or source is None:
        return None
    names = expand_nodelist(settings.text(source))
    listed = Value(name="NNODES", text=str(len(names)), source=source, value=len(names))
    local_id = settings.text("SLURM_LOCALID")
    return Scheduled(
        scheduler="Slurm",
        rank=rank,
        nnodes=_number(settings, "NNODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or listed,
        master=plain("MASTER_ADDR", names[0], source) if names else None,
        several=(f"SLURM_LOCALID={local_id}", "srun --ntasks-per-node=1") if local_id.strip("0") else None,
    )


def _kubernetes(settings: Settings) -> Scheduled | None:
    rank = _number(settings, "NODE_RANK", "JOB_COMPLETION_INDEX")
    return None if rank is None else Scheduled(scheduler="Kubernetes", rank=rank)


def _open_mpi(settings: Settings) -> Scheduled | None:
    world = "OMPI_COMM_WORLD_"
    rank = _number(settings, "NODE_RANK", f"{world}RANK")
    size = _number(settings, "NNODES", f"{world}SIZE")
    if rank is None or size is None:
        return None
    per_node = settings.text(f"{world}LOCAL_SIZE")
    several = (f"{world}LOCAL_SIZE={per_node}", "-npernode 1") if per_node not in ("", "1") else None
    return Scheduled(scheduler="Open MPI", rank=rank, nnodes=size, several=several)


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
