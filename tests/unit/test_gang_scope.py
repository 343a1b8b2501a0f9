"""The gang stays what it says: standard library only, never torch, and nothing of the training."""

import ast
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
GANG = sorted((PROJECT / "app/gang").glob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_the_gang_imports_nothing_but_the_standard_library_and_the_launcher() -> None:
    assert GANG
    for path in GANG:
        assert imports(path) <= sys.stdlib_module_names | {"app"}, path.name


def test_a_start_does_not_import_torch_or_psutil_into_the_launcher() -> None:
    code = "import sys, app.supervise.node; print([name for name in ('torch', 'psutil') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
