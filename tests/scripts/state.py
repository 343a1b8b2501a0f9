"""Writes what a script finds around it to FOLDER/rankN.json, before and after it imports torch: state.py FOLDER."""

import faulthandler
import gc
import json
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType


class Squares:
    """A data set whose workers must find it in `__main__` again."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index * index, multiprocessing.current_process().name


def descriptors() -> list[int]:
    """Those that are open, without the one that lists them."""
    return [number for number in range(256) if Path(f"/proc/self/fd/{number}").exists()]


def death_signal() -> int:
    import ctypes

    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))
    return number.value


def depth(frame: FrameType | None) -> int:
    return 0 if frame is None else 1 + depth(frame.f_back)


def before_torch() -> dict[str, object]:
    main = sys.modules["__main__"]
    return {
        "argv": sys.argv,
        "main": [main.__name__, main.__file__, repr(main.__spec__), repr(main.__package__), sorted(vars(main))],
        "path": sys.path,
        "flags": repr(sys.flags),
        "python": [sys.executable, sys.prefix, sys.getrecursionlimit(), sys.getswitchinterval()],
        "hooks": [
            sys.excepthook is sys.__excepthook__,
            sys.displayhook is sys.__displayhook__,
            sys.gettrace(),
            len(sys.meta_path),
        ],
        "handlers": {number.name: repr(signal.getsignal(number)).partition(" at ")[0] for number in signal.Signals},
        "mask": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "wakeup": signal.set_wakeup_fd(-1),
        "umask": [os.umask(0o077), os.umask(0o027)],
        "nice": os.nice(0),
        "cpus": sorted(os.sched_getaffinity(0)),
        "limits": {
            name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")
        },
        "oom": Path("/proc/self/oom_score_adj").read_text(),
        "ids": [os.getuid(), os.getgid(), os.getgroups()],
        "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "dies": death_signal(),
        "folder": str(Path.cwd()),
        "descriptors": descriptors(),
        "stdin": [str(Path("/proc/self/fd/0").readlink()), sys.stdin.isatty(), sys.stdin.encoding],
        "outputs": [
            [
                each.name,
                each.encoding,
                each.errors,
                each.line_buffering,
                getattr(each, "write_through", None),
                each.isatty(),
                each is original,
            ]
            for each, original in ((sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__))
        ],
        "locale": [locale.setlocale(locale.LC_ALL), locale.getpreferredencoding()],
        "faulthandler": faulthandler.is_enabled(),
        "threads": [threading.active_count(), len([*Path("/proc/self/task").iterdir()])],
        "native": threading.get_native_id() == os.getpid(),
        "depth": depth(sys._getframe()),
        "collector": [gc.isenabled(), gc.get_threshold()],
        "logging": [repr(logging.root.handlers), logging.root.level],
        "process": [
            multiprocessing.current_process().name,
            repr(multiprocessing.parent_process()),
            multiprocessing.get_start_method(allow_none=True),
            repr(multiprocessing.active_children()),
        ],
        "environ": dict(os.environ),
    }


def after_torch() -> dict[str, object]:
    import numpy
    import torch

    return {
        "torch": [
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            str(torch.get_default_dtype()),
        ],
        "cuda": torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]  # as torch has it
        "filters": repr(sorted(map(str, warnings.filters))),
        "own": [
            random.random(),
            numpy.random.random(),
            torch.initial_seed(),
            multiprocessing.current_process().authkey.hex(),
        ],
        "work": torch.ones(300, 300).mm(torch.ones(300, 300)).sum().item(),
    }


def loaded(method: str) -> list[list[object]]:
    """What data loader workers of a start method see."""
    from typing import Any

    from torch.utils.data import DataLoader

    squares: Any = Squares()
    batches: Any = DataLoader(squares, num_workers=1, multiprocessing_context=method, batch_size=None)
    return [[value, name.rpartition("-")[0]] for value, name in batches]


def forked() -> list[object]:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b"child")
        os._exit(7)
    return [os.read(read, 5).decode(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


def main() -> None:
    state = before_torch() | after_torch() | {"forked": forked()}
    if os.environ["RANK"] == "0":
        state["loaders"] = {method: loaded(method) for method in ("fork", "spawn", "forkserver")}
    Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(state))


if __name__ == "__main__":
    main()
