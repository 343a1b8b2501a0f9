"""`status`: what the job does at this moment, as this node knows it; starts and stops nothing."""

from collections.abc import Sequence

from app.config.options import Parser
from app.supervise.status import read_status, to_json, to_text


def main(arguments: Sequence[str]) -> int:
    """0 when a launcher is running here, 1 when none is."""
    parser = Parser(
        prog="status",
        description="What the job does at this moment, as this node knows it. 0 when a launcher runs here, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="for programs: a list of launchers")
    wanted = parser.read(arguments)
    found = read_status()
    print(to_json(found) if wanted.json else to_text(found))
    return 0 if found else 1
