"""`torchrun ... -m app.train [--flags]`. Settings are read before torch is imported, so that mistakes show at once."""

import os
import sys

from app.train.settings import UserError, read_settings, refuse


def main() -> int:
    """The exit code; see `loop.main`."""
    try:
        settings = read_settings(sys.argv[1:], os.environ)
    except UserError as error:
        return refuse(error)
    from app.train import loop

    return loop.main(settings) or 0


sys.exit(main())
