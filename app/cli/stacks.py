"""`stacks`: where every rank of this node is at this moment; nothing is stopped for it."""

from collections.abc import Sequence

from app.config.options import Parser
from app.supervise.stacks import read_stacks, to_json, to_text


def main(arguments: Sequence[str]) -> int:
    """0 when every rank answered, 1 otherwise."""
    parser = Parser(prog="stacks", description="Where every rank of this node is. 0 when each answered, 1 otherwise.")
    parser.add_argument("--json", action="store_true", help="for programs: a list of ranks")
    wanted = parser.read(arguments)
    found = read_stacks()
    print(to_json(found) if wanted.json else to_text(found))
    return 0 if found and not any("why" in each for each in found) else 1
