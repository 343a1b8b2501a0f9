"""`python -m app.fleet`, which needs nothing installed."""

import sys
from pathlib import Path

# The one package that the settings need, where this Python lacks it.
sys.path += map(str, Path(__file__).parents[1].glob("lib/*.whl"))

if __name__ == "__main__":
    from app.fleet.command import entry

    sys.exit(entry())
