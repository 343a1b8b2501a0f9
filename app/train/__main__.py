"""`torchrun ... -m app.train [--flags]`: reads the settings before it imports torch, so that a mistake shows at once."""

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
