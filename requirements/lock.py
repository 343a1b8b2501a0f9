"""Write the locks (*.txt) of all *.in: every package pinned, every file of it by its hash, for Python 3.11 to 3.13.

    python requirements/lock.py            # needs uv; reads package metadata only, no wheel but a local one

PyTorch's own index carries the CPU wheels. Where it cannot be reached, a folder with one of them (PIP_FIND_LINKS) is
enough to resolve, and torch-cpu.sha256 supplies the hashes of the wheels for the other Pythons and for aarch64. That
file has the format of sha256sum: check it with `sha256sum -c` in a folder with the wheels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    for name in ("cpu", "cuda", "rocm", "dev"):
        lock(uv, name)
    return 0


def lock(uv: str, name: str) -> None:
    options = ["--universal", "--python-version=3.11", "--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    # torch==2.13.0 would accept a 2.13.0+cpu: only the locks that want it may see it.
    source = [] if name in ("cuda", "rocm") else cpu_wheels()
    command = [uv, "pip", "compile", *options, *source, f"{name}.in", "--output-file", f"{name}.txt"]
    subprocess.run(command, cwd=HERE, check=True)
    file = HERE / f"{name}.txt"
    file.write_text("# Made by requirements/lock.py; do not edit.\n" + with_torch_hashes(file.read_text()))


def cpu_wheels() -> list[str]:
    folder = os.environ.get("PIP_FIND_LINKS")
    where = (
        ["--find-links", folder] if folder else ["--extra-index-url", TORCH_INDEX, "--index-strategy=unsafe-best-match"]
    )
    return [*where, "--no-emit-find-links", "--no-emit-index-url"]


def with_torch_hashes(text: str) -> str:
    """The lock with the hashes of all CPU wheels of torch, whichever of them the resolver saw."""
    kept = [line.split() for line in (HERE / "torch-cpu.sha256").read_text().splitlines()]
    found = re.search(r"^torch==(\S+\+cpu) \\\n((?:    --hash=\S+(?: \\)?\n)+)", text, re.MULTILINE)
    if found is None:
        return text
    version = found.group(1)
    wheels = {f"sha256:{digest}" for digest, name in kept if name.startswith(f"torch-{version}-")}
    hashes = sorted(wheels | set(re.findall(r"--hash=(\S+)", found.group(2))))
    lines = " \\\n".join(f"    --hash={digest}" for digest in hashes)
    return f"{text[: found.start()]}torch=={version} \\\n{lines}\n{text[found.end() :]}"


if __name__ == "__main__":
    sys.exit(main())
