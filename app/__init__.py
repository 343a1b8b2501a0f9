"""The launcher and the training script. A regular package: one named `app` on a user's PYTHONPATH must not hide it."""
