"""`torchrun ... -m app.train [--flags]`. Settings are read before torch is imported, so that mistakes show at once."""

import os
import sys
import traceback

from app.train.settings import UserError, read_settings, refuse


def main() -> int:
    """The exit code where the run did not get as far as to end the process itself; see `loop.main`."""
    try:
        settings = read_settings(sys.argv[1:], os.environ)
    except UserError as error:
        return refuse(error)
    from app.train import loop, ranks

    try:
        loop.main(settings)
    except Exception:
        traceback.print_exc()
        ranks.leave(1)
    return 1


sys.exit(main())
