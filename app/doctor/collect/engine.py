"""The container engine and what goes with it, where they can be seen: on the machine itself, not in a container."""

import re
import shutil
import subprocess
from collections.abc import Mapping

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "Docker": ("docker", "version", "--format", "{{.Server.Version}}"),
    "Compose": ("docker", "compose", "version", "--short"),
    "NVIDIA Container Toolkit": ("nvidia-ctk", "--version"),
}
PATIENCE = 5.0
"""Seconds for each answer: an engine that hangs must not stop doctor."""


def engine_versions() -> dict[str, str]:
    """Versions by name; "" for what is here and gives none. Empty in a container, which has none of the commands."""
    return {name: _version(command) for name, command in COMMANDS.items() if shutil.which(command[0])}


def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found and not done.returncode else ""
