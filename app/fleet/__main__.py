"""`python -m app.fleet`."""

import sys

from app.fleet.command import entry

if __name__ == "__main__":
    sys.exit(entry())
