"""`python -m app.known_errors docs/errors` writes a page for each layer, and a list of all errors."""

import sys
from pathlib import Path

from app.known_errors.pages import pages

folder = Path(sys.argv[1])
for name, page in pages().items():
    (folder / name).write_text(page, encoding="utf-8")
