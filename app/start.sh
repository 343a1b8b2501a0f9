#!/bin/sh
# The launcher under the image's own Python: the first one that has a torch, those on PATH before others.
#
#   sh start.sh [COMMAND] [ARGS...]       as `python entrypoint.py`
#   sh start.sh --compile                 bytecode for a root file system that is read-only at run time
#
# torch is looked for, not loaded, and judged by what it has, not by its version.
home=$(cd "$(dirname "$0")/.." && pwd)
check='
import sys
from importlib.util import find_spec
from pathlib import Path
if sys.version_info < (3, 11):
    sys.exit("Python %d.%d is too old, 3.11 is needed" % sys.version_info[:2])
torch = find_spec("torch")
if torch is None or not torch.origin:
    sys.exit("it has no torch")
part = "distributed/elastic/multiprocessing/subprocess_handler/handlers.py"
if not (Path(torch.origin).parent / part).exists():
    sys.exit("its torch is too old: it lacks %s, 2.8 is the oldest that was tried" % part)
'
told=
for python in python python3 /opt/*/bin/python3 /opt/conda/envs/*/bin/python3 /usr/local/bin/python3 /usr/bin/python3; do
    found=$(command -v "$python") || continue
    case $told in *"  $found: "*) continue ;; esac
    if why=$("$found" -c "$check" 2>&1); then
        [ "$1" != --compile ] || exec "$found" -m compileall -q "$home"
        exec "$found" "$home/entrypoint.py" "$@"
    fi
    told="$told
  $found: $(echo "$why" | tail -n 1)"
done
echo "torchrun-compose: no Python of this image can train:${told:- there is none}
Fix: take an image with Python 3.11 or newer and torch 2.8 or newer, or put that Python first on its PATH." >&2
exit 2
