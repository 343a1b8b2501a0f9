"""`torchrun ... -m app.bench [--seconds 60] [--largest 1G]`: measures the network between the ranks of the job."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path


def size(text: str) -> int:
    """Bytes of `text`, such as 64K, 1MiB or 4096.

    Raises argparse.ArgumentTypeError for anything else.
    """
    found = re.fullmatch(r"(\d+)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 64K, 16M or 1G")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2].upper()]


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """`seconds`, `smallest` and `largest` (bytes); ends the program on wrong arguments, as argparse does."""
    parser = argparse.ArgumentParser(prog="bench", description="Measures the network between the ranks of the job.")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all measurements (default 60)")
    parser.add_argument("--smallest", type=size, default=1 << 10, help="first size (default 1K)")
    parser.add_argument("--largest", type=size, default=1 << 30, help="last size that is tried (default 1G)")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="what doctor runs: pairs and an all-reduce only, the figures to FILE"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """0 when every result was right, 1 when one was wrong, 2 when there is nothing to measure."""
    wanted = options(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        print("bench needs at least two ranks: list two nodes in NODES, or set NPROC_PER_NODE=2.", file=sys.stderr)
        return 2
    from app.bench.session import check, run

    if wanted.check:
        return check(wanted.check)
    return run(seconds=wanted.seconds, smallest=wanted.smallest, largest=wanted.largest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
