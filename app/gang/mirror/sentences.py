"""What people read about the exchange of checkpoints."""

from collections.abc import Callable, Sequence

from app.gang.mirror.plan import Remark

Names = Callable[[int], str]
"""A node as shown, by its rank."""


def size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def shown(path: str) -> str:
    """A peer's path ends up on terminals."""
    return "".join(char if char.isprintable() else "?" for char in path[:200])


def of_remarks(remarks: Sequence[Remark], names: Names) -> list[str]:
    """One sentence for each kind of remark, of which there may be thousands."""
    kinds: dict[str, list[Remark]] = {}
    for remark in remarks:
        kinds.setdefault(remark.kind, []).append(remark)
    told = []
    for kind, found in kinds.items():
        first, more = found[0], f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        where = ", ".join(dict.fromkeys(names(one.ranks[0]) for one in found[:4] if one.ranks))
        told.append(_SENTENCES[kind](first, shown(first.path) + more, where, names))
    return told


def _restored(first: Remark, paths: str, where: str, names: Names) -> str:
    return (
        f"checkpoints: {paths} on {where} is torn (its writer was killed while it saved); the last whole version, "
        f"kept on {names(first.ranks[-1])}, takes its place on all nodes"
    )


def _torn(_first: Remark, paths: str, where: str, _names: Names) -> str:
    return (
        f"warning: checkpoints: {paths} on {where} is torn (its writer was killed while it saved), and no node has a "
        "whole version. If the script cannot load it, move it away: it resumes from the one before"
    )


def _over_limit(first: Remark, paths: str, where: str, _names: Names) -> str:
    return (
        f"warning: checkpoints: {paths} ({size(first.size)}) was not copied to {where}: more than MIRROR_LIMIT. "
        "Raise MIRROR_LIMIT on all nodes to have it copied"
    )


def _disk_full(first: Remark, paths: str, where: str, _names: Names) -> str:
    return (
        f"warning: checkpoints: {paths} ({size(first.size)}) was not copied to {where}: its disk has not enough free "
        "room. Make room there, or point CHECKPOINT_DIR at a larger disk"
    )


def _kept_out(first: Remark, paths: str, _where: str, _names: Names) -> str:
    entries = f"{first.count} older entries" if first.count > 1 else f"the older {paths}"
    return (
        f"checkpoints: {entries} ({size(first.size)}) of CHECKPOINT_DIR stayed where they are: a resume needs the "
        "newest ones. MIRROR_KEEP=all copies everything"
    )


_SENTENCES: dict[str, Callable[[Remark, str, str, Names], str]] = {
    "restored": _restored,
    "torn": _torn,
    "over_limit": _over_limit,
    "disk_full": _disk_full,
    "kept_out": _kept_out,
}
