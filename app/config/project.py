"""Where this project lies."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
"""The folder that holds `app/`."""
VERSION = "0.1.0"
"""As in pyproject.toml, which the image lacks, and on the image's label; the nodes compare it."""
