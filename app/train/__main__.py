"""`torchrun ... -m app.train [--flags]`. Settings are read before torch is imported, so that mistakes show at once."""

import os
import sys
import traceback

from app.train.settings import TrainError, leave, read_settings, refuse

try:
    settings = read_settings(sys.argv[1:], os.environ)
    from app.train.loop import train

    train(settings)
except TrainError as error:
    refuse(error)
except Exception:
    traceback.print_exc()
    leave(1)
