"""Runs the user's script inside torchrun's worker so that an exception leaves its text in TORCHELASTIC_ERROR_FILE.

    python worker.py SCRIPT [ARGS...]        python worker.py -m MODULE [ARGS...]

A shell script or another program takes this process over. A script in Python sees what `python SCRIPT` gives it:
sys.argv, sys.path[0], and a `__main__` of its own that DataLoader workers started by spawn can import again. Imports
are few and late, so that the script finds a fresh interpreter.
"""

import atexit
import contextlib
import os
import sys
from types import CodeType, ModuleType, TracebackType
from typing import NoReturn


def main(ended: list[int]) -> NoReturn:
    """Replaces `__main__` by the script's own module and runs it; leaves its exit code in `ended`, for `leave`."""
    if sys.argv[1] != "-m" and (program := interpreter(sys.argv[1])):
        os.execvp(program[0], [*program, *sys.argv[2:]])  # noqa: S606 - no shell is wanted
    folder = watch_for_stalls()
    loaded = frozenset(sys.modules)
    try:
        code = load_module(sys.argv[2]) if sys.argv[1] == "-m" else load_script(sys.argv[1])
        del sys.argv[0]
        if sys.argv[0] == "-m":
            sys.argv[:2] = [str(sys.modules["__main__"].__file__)]
        exec(code, sys.modules["__main__"].__dict__)  # noqa: S102 - running the user's script is this file's purpose
    except SystemExit as error:
        # `except Exception as error: print(error); sys.exit(1)` has its reason in what was being handled.
        reason = error if isinstance(error.code, str) else error.__context__
        if reason is not None and error.code:
            reason.__traceback__ = trim(reason.__traceback__)
            record(reason, folder)
        ended.append(error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None))
        raise
    except Exception as error:
        error.__traceback__ = trim(error.__traceback__)
        record(error, folder)
        sys.excepthook(type(error), error, error.__traceback__)
        ended.append(1)
        sys.exit(1)
    tell_of_copies(loaded)
    ended.append(0)
    sys.exit(0)


def interpreter(path: str) -> list[str]:
    """The command that runs a file which is no Python; empty for Python. A shell script need not be executable."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib is not loaded at start-up
            first = file.read(256).partition(b"\n")[0]
    except OSError:
        return []
    if first.startswith(b"\x7fELF"):
        return [path]
    if first.startswith(b"#!"):
        return [] if b"python" in first else [*first[2:].decode(errors="replace").strip().split(None, 1), path]
    return ["bash", path] if path.endswith((".sh", ".bash")) else []


def uses_torch(loaded: frozenset[str]) -> bool:
    """Whether the script has imported torch, also where that was among the modules `loaded` before it began."""
    if "torch" not in loaded:
        return "torch" in sys.modules
    own = [module for name, module in [*sys.modules.items()] if name not in loaded or name == "__main__"]
    held = [value for module in own for value in [*vars(module).values()]]
    names = [value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "") for value in held]
    return any(isinstance(name, str) and name.partition(".")[0] == "torch" for name in names)


def tell_of_copies(loaded: frozenset[str]) -> None:
    """Ranks that never joined a process group have trained a copy each, and nobody else would notice."""
    c10d, world = sys.modules.get("torch.distributed.distributed_c10d"), os.environ.get("WORLD_SIZE", "1")
    joined = c10d and getattr(c10d, "_default_pg_init_method", "unknown") is not None
    if not joined and uses_torch(loaded) and world != "1" and os.environ.get("RANK") == "0":
        told = f"the script never called init_process_group: its {world} ranks ran apart, and share no gradients"
        print(f"torchrun-compose: {told}. If that is not meant, see docs/own-script.md", file=sys.stderr)


def leave(ended: list[int]) -> None:
    """Ends the process after the script's own exit handlers and threads, before Python takes the interpreter down.

    A Gloo thread that lets go of its last work then still needs the GIL: CPython before 3.14 ends such a thread inside
    a C++ destructor, and a script that has trained well dies of SIGABRT (`terminate called without an active
    exception`; with torch 2.13 plain torchrun lost 13 of 38 runs of tests/scripts/classic.py that way).
    """
    import ctypes

    if ended:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        ctypes.CDLL(None).fflush(None)
        os._exit(ended[0])


def watch_for_stalls() -> str:
    """Starts watchdog.py where the launcher asks for it: TORCHRUN_COMPOSE_STALLS=SECONDS:FOLDER. One rank alone waits
    for nobody, and only tells its stacks. Returns the launcher's private folder, "" without one."""
    from importlib.util import module_from_spec, spec_from_file_location

    patience, _, folder = os.environ.pop("TORCHRUN_COMPOSE_STALLS", "").partition(":")
    if not folder:
        return ""
    spec = spec_from_file_location("torchrun_compose_watchdog", __file__.removesuffix("worker.py") + "watchdog.py")
    if spec and spec.loader:
        watchdog = module_from_spec(spec)
        spec.loader.exec_module(watchdog)
        watchdog.watch(folder, 0.0 if os.environ.get("WORLD_SIZE") == "1" else float(patience))
    return folder


def load_script(path: str) -> CodeType:
    """The code of a file; makes `__main__` and sys.path[0] what `python path` makes them."""
    from importlib.machinery import SourceFileLoader

    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))  # noqa: PTH120 - pathlib is not loaded at start-up
    with open(path, "rb") as file:  # noqa: PTH123
        code = compile(file.read(), path, "exec", dont_inherit=True)
    become(ModuleType("__main__"), __file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    return code


def load_module(name: str) -> CodeType:
    """The code of module NAME or NAME.__main__; makes `__main__` and sys.path[0] what `python -m` makes them."""
    import importlib.util
    from importlib.abc import InspectLoader

    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd()  # noqa: PTH109
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    if spec is None or not isinstance(spec.loader, InspectLoader):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    code = spec.loader.get_code(spec.name)
    if code is None:
        raise ImportError(f"No code object available for {name}", name=name)
    origin = {"__file__": spec.origin, "__cached__": spec.cached, "__loader__": spec.loader}
    become(ModuleType("__main__"), __spec__=spec, __package__=spec.parent, **origin)
    return code


def become(module: ModuleType, **attributes: object) -> None:
    """Makes `module` the process's `__main__`: pickle and multiprocessing look their names up there."""
    module.__dict__.update(attributes, __builtins__=__builtins__)
    sys.modules["__main__"] = module
    if "__mp_main__" in sys.modules:
        # multiprocessing's other name for it, under which its spawned processes send objects back.
        sys.modules["__mp_main__"] = module


def trim(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame that is not of this file."""
    rest = trace
    while rest is not None and rest.tb_frame.f_code.co_filename == __file__:
        rest = rest.tb_next
    return rest


def record(error: BaseException, folder: str) -> None:
    """Writes the error as torch's `@record` does (elastic/multiprocessing/errors/error_handler.py, torch 2.13),
    unless the script's own `@record` did; on a full disk its text into `folder`, for elastic.py."""
    import json
    import time
    import traceback

    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):  # noqa: PTH110
        return
    extra = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(time.time()))}
    try:
        with open(path, "w", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            json.dump({"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}}, file)
    except OSError:
        # The disk is full, and torchrun falls over an empty file (ProcessFailure, as above).
        with contextlib.suppress(OSError):
            os.unlink(path)  # noqa: PTH108
            with open(f"{folder}/error-{os.getpid()}", "x", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
                file.write(f"{type(error).__name__}: {error}")


def die_with_parent() -> None:
    """A worker whose torchrun was killed must not train on: no peer would ever notice."""
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    exit_code = list[int]()
    atexit.register(leave, exit_code)  # registered first, so it runs last
    main(exit_code)
