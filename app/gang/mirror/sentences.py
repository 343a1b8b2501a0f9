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
        told.append(
            _SENTENCES[kind].format(
                paths=shown(first.path) + more,
                where=where,
                kept=names(first.ranks[-1]) if first.ranks else "",
                size=size(first.size),
                older=f"{first.count} older entries" if first.count > 1 else f"the older {shown(first.path)}",
            )
        )
    return told


_SENTENCES = {
    "restored": "checkpoints: {paths} on {where} is torn (its writer was killed while it saved); the last whole "
    "version, kept on {kept}, takes its place on all nodes",
    "torn": "warning: checkpoints: {paths} on {where} is torn (its writer was killed while it saved), and no node has "
    "a whole version. If the script cannot load it, move it away: it resumes from the one before",
    "incomplete": "warning: checkpoints: {paths} lacks files that an older one has: they were on a disk that is gone. "
    "It was set aside on {where} (folder torn beside CHECKPOINT_DIR); the job resumes from the one before",
    "over_limit": "warning: checkpoints: {paths} ({size}) was not copied to {where}: more than MIRROR_LIMIT. "
    "Raise MIRROR_LIMIT on all nodes to have it copied",
    "disk_full": "warning: checkpoints: {paths} ({size}) was not copied to {where}: its disk has not enough free room. "
    "Make room there, or point CHECKPOINT_DIR at a larger disk",
    "kept_out": "checkpoints: {older} ({size}) of CHECKPOINT_DIR stayed where they are: a resume needs the newest "
    "ones. MIRROR_KEEP=all copies everything",
}
"""By Remark.kind."""
