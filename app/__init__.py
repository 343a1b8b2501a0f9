"""The launcher and the training script. A regular package: one named `app` on a user's PYTHONPATH must not hide it."""

import sys

# Other images have other Pythons.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write("torchrun-compose: this Python is too old, 3.11 or newer is needed: " + sys.executable + "\n")
    sys.exit(2)
