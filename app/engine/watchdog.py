"""Runs in every worker beside the script: tells when this rank makes no progress, where it is, and in which collective.

worker.py loads it from its file, so that the script finds no module of ours; standard library only. A thread wakes a
few times in a minute; while the main thread moves it reads a clock and writes nothing.

A rank makes no progress when its main thread stays at one place, none of its process groups starts or completes
anything, and neither its other threads nor any process below it use a processor or move bytes. Whatever can be work
counts as work: a hang that is told late costs minutes, a healthy job that is called hung may be ended (HANG_TIMEOUT).
"""

import atexit
import contextlib
import json
import linecache
import os
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from types import FrameType
from typing import NamedTuple

BUSY = 0.02
"""Share of a processor that the main thread uses, or waits for, when it works; in a socket's wait it is hardly any."""
TREE_BUSY = 0.05
"""The same for all its threads and all processes below it: a hundred that only wait use some of it, too."""
BYTES = 10_000
"""A second, through files and sockets: a slow download. What monitoring tools send is less."""
WRITTEN_BACK = 256
"""Pages that the machine wrote to its disks between two samples: then a thread that waits for a disk does not hang."""
LONGEST_PAUSE = 5.0
NAME = "torchrun-compose"
"""Of our threads."""
STACK_BYTES, LINE_LENGTH, NAME_LENGTH, FRAMES = 20_000, 200, 80, 100
TCP_BYTES_ACKED = 120
"""Offset in struct tcp_info, with bytes_received after it (linux/tcp.h)."""
DEBUGGERS = ("/pdb.py", "/bdb.py", "/pydevd.py", "/pydevd_bundle/", "/debugpy/")
SPINNING = ("NCCL", "nccl", "pt_nccl", "pt_autograd", "cuda")
"""Threads of a process with a GPU that may poll for as long as they wait, by the beginnings of their names."""
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
DTYPES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
}


class Activity(NamedTuple):
    """What a process and all below it have done so far."""

    seconds: float
    """Of processor time, ended and awaited children included."""
    moved: int
    """Bytes through files and pipes."""
    states: str
    """Of their main threads, as in /proc/PID/stat: D waits for a disk, T and t are stopped, Z and X have ended."""


class Sample(NamedTuple):
    """What has to change between two samples for a rank that works, when its main thread stays where it is."""

    time: float
    seconds: float
    moved: int
    states: str
    written_back: int
    gpu: int
    """Blocks of GPU memory that were ever handed out."""
    recorded: list[object]


def watch(folder: str, patience: float) -> None:
    """Writes FOLDER/rankN.json while this rank has made no progress for `patience` seconds, and removes it afterwards.
    A shorter time-out of a process group counts by half: once it is over, nobody could tell who had not come.

    The file holds `rank`, `seconds`, `at` (the script's own line), the collectives that this rank has `entered` last
    as torch's flight recorders have them, the `stack`, and the `recorder`'s last entries. FOLDER/rankN is written at
    every wake-up and holds the pid. When it grows old, native code keeps the GIL from this thread.
    FOLDER/rankN.ended is the same file as the first, of a script that has ended: others may wait for it.

    Whoever writes into the pipe FOLDER/rankN.ask finds all stacks in FOLDER/rankN.stacks a moment later, also when
    `patience` is 0 and nothing else is watched.
    """
    heartbeat = os.path.join(folder, f"rank{os.environ['RANK']}")  # noqa: PTH118 - no pathlib at start-up
    threading.Thread(target=_answer, args=(heartbeat,), name=NAME, daemon=True).start()
    if patience:
        threading.Thread(target=_watch, args=(heartbeat, patience), name=NAME, daemon=True).start()
        atexit.register(_tell_end, f"{heartbeat}.ended", os.getpid())


def _answer(heartbeat: str) -> None:
    """Waits for questions in `open`: the script finds no descriptor that it did not expect."""
    asked = f"{heartbeat}.ask"
    with contextlib.suppress(OSError):
        os.mkfifo(asked, 0o600)
        while True:
            descriptor = os.open(asked, os.O_RDONLY | os.O_CLOEXEC)
            os.read(descriptor, 4096)
            os.close(descriptor)
            _tell_stacks(f"{heartbeat}.stacks")


def _tell_stacks(path: str) -> None:
    """Where each thread of this rank is, the main one first; ours apart."""
    main, frames = threading.main_thread().ident, sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    order = sorted(frames, key=lambda ident: ident != main)
    stacks = [(ident, "".join(traceback.format_stack(frames[ident]))[-STACK_BYTES:]) for ident in order]
    threads = [
        {"name": names.get(ident, "of native code"), "stack": stack}
        for ident, stack in stacks
        if names.get(ident) != NAME
    ]
    at = _own_line(frames.get(main or 0))
    # A frame that is kept would keep the script's tensors.
    del frames
    entered = [one for each in _recorded() if (one := _collective(each))]
    known = {"time": time.time(), "pid": os.getpid(), "run_id": os.environ.get("TORCHELASTIC_RUN_ID", "")}
    _write(path, json.dumps({**known, "at": at, "entered": entered, "threads": threads}))


def _watch(heartbeat: str, patience: float) -> None:
    path = f"{heartbeat}.json"
    main = threading.main_thread().ident or 0
    clock = time.pthread_getcpuclockid(main)
    place, wanted, before, told = list[object](), 0.0, None, False
    seen = since = time.monotonic()
    while frame := sys._current_frames().get(main):
        now, uses_gpu = time.monotonic(), _uses_gpu()
        limit = min(patience, _shortest_timeout() / 2)
        pause = min(LONGEST_PAUSE, limit / 4)
        # Whoever was stopped, or did not come to a turn, did not stand still meanwhile.
        since += max(0.0, now - seen - 2 * pause)
        here, want = _places(frame), time.clock_gettime(clock) + _waited_for_a_processor()
        # A rank that waits for its GPU may spin; there only the places and the collectives tell.
        works = want - wanted > BUSY * (now - seen) and not uses_gpu
        place, seen, wanted, moved = here, now, want, works or here != place
        if moved:
            before = None
        else:
            sample = _take_sample(now, uses_gpu)
            moved = before is not None and has_worked(before, sample)
            before = sample
        if moved:
            since = now
            if told:
                told = False
                with contextlib.suppress(OSError):
                    os.unlink(path)  # noqa: PTH108
        elif now - since >= limit and not _is_debugged(frame):
            told = _tell(path, now - since, frame)
        # A frame that is kept would keep the script's tensors.
        del frame
        _write(heartbeat, str(os.getpid()))
        time.sleep(pause)


def _places(frame: FrameType) -> list[object]:
    """Where the main thread is, and those that Python has not started (autograd's); how much each group has seen."""
    native = sys._current_frames().keys() - {thread.ident for thread in threading.enumerate()}
    others = [each for ident, each in sys._current_frames().items() if ident in native]
    stacks = [[(id(each), each.f_lasti) for each in _outwards(top)] for top in (frame, *others)]
    return [stacks, _sequences()]


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers, the innermost FRAMES."""
    for _ in range(FRAMES):
        if frame:
            yield frame
            frame = frame.f_back


def _is_debugged(frame: FrameType) -> bool:
    """Whether a person debugs this rank: torch.distributed.breakpoint() keeps the others at a barrier meanwhile."""
    return any(name in each.f_code.co_filename for each in _outwards(frame) for name in DEBUGGERS)


def _take_sample(now: float, uses_gpu: bool) -> Sample:
    total, threads, own = activity(os.getpid()), _threads(), time.thread_time()
    if uses_gpu:
        # Of this process only what cannot spin counts.
        own = activity(os.getpid(), alone=True).seconds
        own -= sum(seconds for name, _, seconds in threads if not name.startswith(SPINNING))
    states = total.states + "".join(state for _, state, _ in threads)
    moved = total.moved - _bytes("/proc/thread-self/io") + _socket_bytes()
    recorded: list[object] = [(one["record_id"], one["state"]) for one in _recorded()]
    return Sample(now, total.seconds - own, moved, states, _written_back(), _gpu_blocks(), recorded)


def has_worked(before: Sample, now: Sample) -> bool:
    # A process that ended takes its figures with it, therefore abs.
    seconds = now.time - before.time
    return (
        abs(now.seconds - before.seconds) > TREE_BUSY * seconds
        or abs(now.moved - before.moved) > BYTES * seconds
        or now.gpu != before.gpu
        or now.recorded != before.recorded
        or any(state in now.states for state in "Tt")
        or ("D" in now.states and now.written_back - before.written_back > WRITTEN_BACK)
    )


def activity(pid: int, *, alone: bool = False, proc: str = "/proc") -> Activity:
    """What a process has done, with all below it unless `alone`. Raises OSError where it has ended."""
    found = {pid: _stat(f"{proc}/{pid}")}
    if not alone:
        rest, generation = dict(_all_processes(proc)), [pid]
        while generation:
            generation = [each for each, fields in rest.items() if int(fields[1]) in generation and each not in found]
            found |= {each: rest[each] for each in generation}
    ticks = sum(int(field) for fields in found.values() for field in fields[11:15])
    moved = sum(_bytes(f"{proc}/{each}/io") for each in found)
    return Activity(ticks / os.sysconf("SC_CLK_TCK"), moved, "".join(fields[0] for fields in found.values()))


def _all_processes(proc: str) -> Iterator[tuple[int, list[str]]]:
    for name in os.listdir(proc):  # noqa: PTH208
        if name.isdigit():
            with contextlib.suppress(OSError):
                yield int(name), _stat(f"{proc}/{name}")


def _stat(folder: str) -> list[str]:
    """From the state on (kernel: Documentation/filesystems/proc.rst)."""
    with open(f"{folder}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()


def _threads() -> list[tuple[str, str, float]]:
    """Name, state and seconds of processor time of this process's threads, but for the main one and this one."""
    found, apart = [], {os.getpid(), threading.get_native_id()}
    for name in os.listdir("/proc/self/task"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            if int(name) not in apart:
                with open(f"/proc/self/task/{name}/comm", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
                    comm = file.read()
                fields = _stat(f"/proc/self/task/{name}")
                found.append((comm, fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")))
    return found


def _waited_for_a_processor() -> float:
    """Seconds that the main thread could have run and did not come to a turn; 0 where the kernel does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/schedstat", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) / 1e9
    return 0.0


def _bytes(path: str) -> int:
    """Of calls to read and write, and of a device where pages are mapped."""
    names = ("rchar", "wchar", "read_bytes", "write_bytes")
    with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:  # noqa: PTH123
        fields = dict(line.split(": ") for line in file.read().splitlines())
        return sum(int(fields.get(name, 0)) for name in names)
    return 0


def _socket_bytes() -> int:
    """Bytes that arrived at the TCP sockets of this process, or were acknowledged by their peers; torch's store apart,
    which is asked all the time. The kernel counts them in no file."""
    store, total = int(os.environ.get("MASTER_PORT") or 0), 0
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError, ValueError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):  # noqa: PTH115
                total += _received(int(name), store)
    return total


def _received(descriptor: int, store: int) -> int:
    # Should the script close the descriptor meanwhile, this object never closes another's.
    one = socket.socket(fileno=descriptor)
    try:
        if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
            return 0
        if store in (one.getpeername()[1], one.getsockname()[1]):
            return 0
        told = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_BYTES_ACKED + 16)
        return sum(struct.unpack_from("=QQ", told, TCP_BYTES_ACKED)) if len(told) == TCP_BYTES_ACKED + 16 else 0
    finally:
        one.detach()


def _written_back() -> int:
    """Pages that this machine has written to disks and file servers since it started."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat", encoding="ascii") as file:  # noqa: PTH123
        return sum(int(line.split()[1]) for line in file if line.startswith("nr_written "))
    return 0


def _write(path: str, text: str) -> bool:
    try:
        with open(path + ".new", "w", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            file.write(text)
        os.replace(path + ".new", path)  # noqa: PTH105
    except OSError:
        return False
    return True


def _tell_end(path: str, pid: int) -> None:
    # A child that the script has forked runs this as well.
    if os.getpid() == pid:
        _tell(path, 0, None)


def _tell(path: str, seconds: float, frame: FrameType | None) -> bool:
    stack = "".join(traceback.format_stack(frame))[-STACK_BYTES:] if frame else ""
    known = {"rank": int(os.environ["RANK"]), "run_id": os.environ.get("TORCHELASTIC_RUN_ID", "")}
    entries = _recorded()
    entered = [one for each in entries if (one := _collective(each))]
    used = {one["group"] for one in entered}
    unused = [{"group": group, "sequence": 0, "name": "", "done": True} for group in _groups() if group not in used]
    known |= {"entered": [*unused, *entered]}
    known |= {"recorder": [{name: each.get(name) for name in ENTRY} for each in entries]}
    return _write(path, json.dumps({**known, "seconds": seconds, "at": _own_line(frame), "stack": stack}))


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


def _sequences() -> list[int]:
    """How many collectives each process group of this rank has seen."""
    found = []
    with contextlib.suppress(Exception):  # Whatever this version of torch lacks must not end the watch.
        for group in list(sys.modules["torch.distributed.distributed_c10d"]._world.pg_map):
            with contextlib.suppress(Exception):
                found.append(int(group._get_sequence_number_for_group()))
    return found


def _shortest_timeout() -> float:
    """Seconds after which torch ends a rank that waits in a collective; infinite where that is unknown."""
    found = [float("inf")]
    with contextlib.suppress(Exception):  # As above.
        for group in list(sys.modules["torch.distributed.distributed_c10d"]._world.pg_map):
            for device in group._device_types:
                with contextlib.suppress(Exception):
                    found.append(group._get_backend(device).options._timeout.total_seconds())
    return min(found)


def _groups() -> list[str]:
    """The names of this rank's process groups, as in `_collective`."""
    found = []
    with contextlib.suppress(Exception):  # As above.
        for group, (backends, _) in list(sys.modules["torch.distributed.distributed_c10d"]._world.pg_map.items()):
            # One, or `cpu:gloo,cuda:nccl`.
            for backend in str(backends).split(","):
                parts = (backend.rpartition(":")[2], str(group.group_name), str(group.group_desc))
                found.append(":".join(parts)[:LINE_LENGTH])
    return found


def _recorded() -> list[Mapping[str, object]]:
    """The newest entries of torch's flight recorders (c10d/FlightRecorder.hpp), each group's last among them.

    Oldest first. One recorder holds Gloo's, another NCCL's, and a torch may have them all in the first."""
    found: dict[object, Mapping[str, object]] = {}
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        with contextlib.suppress(Exception):  # As above.
            entries = json.loads(getattr(sys.modules["torch"]._C._distributed_c10d, name)())["entries"]
            last = {str(each["process_group"]): each for each in entries}
            kept = [*last.values(), *entries[-ENTRIES:]]
            found |= {(each["time_created_ns"], each["record_id"]): each for each in kept}
    return sorted(found.values(), key=lambda each: int(str(each["time_created_ns"])))


def _collective(entry: Mapping[str, object]) -> dict[str, object] | None:
    """The fields of app.engine.outcome.Collective; None for a message between two ranks."""
    if entry.get("is_p2p"):
        return None
    backend, _, name = str(entry["profiling_name"]).partition(":")
    group = [str(each) for each in _list(entry.get("process_group"))]
    sizes, dtypes = _list(entry.get("input_sizes")), _list(entry.get("input_dtypes"))
    data = [f"{_dtype(dtype)}[{', '.join(map(str, _list(size)))}]" for size, dtype in zip(sizes, dtypes, strict=False)]
    return {
        "group": ":".join((backend, *group))[:LINE_LENGTH],
        "sequence": entry["collective_seq_id"],
        "name": name.lstrip("_")[:NAME_LENGTH],
        "data": ", ".join(data)[:LINE_LENGTH],
        "done": bool(entry.get("retired")) or entry.get("state") == "completed",
    }


def _list(value: object) -> Collection[object]:
    return value if isinstance(value, list) else ()


def _dtype(name: object) -> str:
    return DTYPES.get(str(name), str(name).lower())


def _gpu_blocks() -> int:
    """Rises with whatever a script computes on its GPU, if it makes a tensor there."""
    with contextlib.suppress(Exception):  # As above.
        if _uses_gpu():
            stats = sys.modules["torch.cuda"].memory_stats_as_nested_dict()
            return int(stats["allocation"]["all"]["allocated"])
    return 0


def _uses_gpu() -> bool:
    cuda = sys.modules.get("torch.cuda")
    return bool(cuda and getattr(cuda, "is_initialized", bool)())
