"""Where this project lies."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
"""The folder that holds `app/`."""
