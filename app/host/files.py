"""Small readings of kernel files: text, numbers, links; absent is None, never an error."""

import re
from pathlib import Path


def text(path: Path) -> str | None:
    """The file's content without surrounding space; None if it cannot be read (sysfs answers EINVAL for "unknown")."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def number(path: Path) -> int | None:
    """A decimal or 0x-prefixed number."""
    content = text(path)
    try:
        return None if content is None else int(content, 0)
    except ValueError:
        return None


def entries(path: Path) -> tuple[str, ...]:
    """Names in a folder, sorted as people sort them (mlx5_2 before mlx5_10); empty if there is none."""
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError:
        return ()
    return tuple(sorted(names, key=natural))


def natural(name: str) -> str:
    """A sort key under which numbers inside a name count as numbers."""
    return re.sub(r"[0-9]+", lambda digits: digits[0].zfill(12), name)


def pci_path(device: Path) -> tuple[str, ...]:
    """Bridges from the root complex down to a PCI function, as folder names: `("pci0000:15", "0000:15:01.0", ...)`.

    Empty for what is no PCI device.
    """
    try:
        real = device.resolve(strict=True)
    except OSError:
        return ()
    parts = real.parts
    start = next(
        (index for index, part in enumerate(parts) if part.startswith("pci0") or part.startswith("pci1")), None
    )
    if start is None:
        return ()
    return tuple(part for part in parts[start:] if part.startswith("pci") or part.count(":") == 2)
