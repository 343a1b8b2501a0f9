"""Runs in every worker beside the script: tells when the script stands still, where, and at which collective.

worker.py loads it from its file, so that the script finds no module of ours; standard library only. A thread wakes a
few times in a minute; while the script moves it reads a clock and writes nothing.
"""

import contextlib
import json
import linecache
import os
import sys
import threading
import time
import traceback
from types import FrameType

BUSY = 0.02
"""Share of a processor that the main thread uses when it works; one that waits for a socket uses hardly any."""
SLOWEST_LOOK = 5.0
STACK_BYTES, LINE_LENGTH = 20_000, 200
ENTRIES = 20
ENTRY = (
    "record_id",
    "profiling_name",
    "process_group",
    "collective_seq_id",
    "p2p_seq_id",
    "state",
    "input_sizes",
    "output_sizes",
    "input_dtypes",
    "time_created_ns",
)
"""What is kept of an entry of the flight recorder."""


def watch(folder: str, patience: float, looks: str = "") -> None:
    """Writes FOLDER/rankN.json while the main thread has stood still for `patience` seconds, and removes it afterwards.

    The file holds `rank`, `seconds`, `at` (the script's own line), the last collective that this rank has entered as
    torch's flight recorder has it (`collective`, `group`, `sequence`), the `stack`, and the `recorder`'s last entries.
    LOOKS/rankN is written at every look and holds the pid. When it grows old, native code keeps Python's lock from this
    thread.
    """
    path = os.path.join(folder, f"rank{os.environ['RANK']}.json")  # noqa: PTH118 - pathlib is not loaded at start-up
    look = os.path.join(looks, f"rank{os.environ['RANK']}") if looks else ""  # noqa: PTH118
    threading.Thread(target=_look_again, args=(path, patience, look), name="torchrun-compose", daemon=True).start()


def _look_again(path: str, patience: float, look: str) -> None:
    main = threading.main_thread().ident or 0
    clock = time.pthread_getcpuclockid(main)
    pause = min(SLOWEST_LOOK, patience / 4)
    place, used, since, told = None, 0.0, time.monotonic(), False
    while frame := sys._current_frames().get(main):
        now, spent, here = time.monotonic(), time.clock_gettime(clock), (id(frame), frame.f_lasti, _sequence())
        # A rank that waits for its GPU may spin; there only the place and the number of collectives tell.
        works = spent - used > BUSY * pause and not _uses_gpu()
        if works or here != place:
            place, since = here, now
            if told:
                told = False
                with contextlib.suppress(OSError):
                    os.unlink(path)  # noqa: PTH108
        elif now - since >= patience:
            told = _tell(path, now - since, frame)
        used = spent
        # A frame that is kept would keep the script's tensors.
        del frame
        if look:
            _leave_sign(look)
        time.sleep(pause)


def _leave_sign(look: str) -> None:
    with contextlib.suppress(OSError):
        with open(look + ".new", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write(str(os.getpid()))
        os.replace(look + ".new", look)  # noqa: PTH105


def _tell(path: str, seconds: float, frame: FrameType) -> bool:
    stack = "".join(traceback.format_stack(frame))[-STACK_BYTES:]
    known = {"rank": int(os.environ["RANK"]), "run_id": os.environ.get("TORCHELASTIC_RUN_ID", "")}
    known |= {"seconds": seconds, "at": _own_line(frame), "stack": stack}
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path + ".new", "w", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            json.dump({**known, **_last_collectives()}, file)
        os.replace(path + ".new", path)  # noqa: PTH105
    except OSError:
        return False
    return True


def _own_line(frame: FrameType | None) -> str:
    """The innermost line that belongs neither to Python nor to an installed package."""
    library = os.path.dirname(os.__file__)  # noqa: PTH120
    while frame:
        code = frame.f_code
        if not code.co_filename.startswith((library, "<")) and "-packages" not in code.co_filename:
            line = linecache.getline(code.co_filename, frame.f_lineno).strip()
            place = f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"  # noqa: PTH119
            return f"{place}, in {code.co_name}: {line}"[:LINE_LENGTH]
        frame = frame.f_back
    return "no line of the script"


def _sequence() -> int:
    """How many collectives the default group has seen; -1 before there is one."""
    try:
        group = sys.modules["torch.distributed.distributed_c10d"]._get_default_group()
        return int(group._get_sequence_number_for_group())
    except Exception:  # Whatever this version of torch lacks must not end the watch.
        return -1


def _last_collectives() -> dict[str, object]:
    """The newest entry of torch's flight recorder (c10d/FlightRecorder.hpp; in torch 2.13 Gloo and NCCL
    both write it), and the last ones as they are; empty where there is none."""
    try:
        entries = json.loads(sys.modules["torch"]._C._distributed_c10d._dump_fr_trace_json())["entries"]
        last = [each for each in entries if not each["is_p2p"]][-1]
        name = str(last["profiling_name"]).partition(":")[2].lstrip("_")
        told = {"collective": name, "group": str(last["process_group"]), "sequence": int(last["collective_seq_id"])}
        return {**told, "recorder": [{name: each.get(name) for name in ENTRY} for each in entries[-ENTRIES:]]}
    except Exception:  # As above.
        return {}


def _uses_gpu() -> bool:
    cuda = sys.modules.get("torch.cuda")
    return bool(cuda and getattr(cuda, "is_initialized", bool)())
