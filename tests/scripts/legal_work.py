"""Odd but legal work, one kind a rank: `legal_work.py SECONDS KIND[+KIND]...`, for each rank. Nothing of it is a hang.

The kinds whose name starts with `idle` are the other half of the proof: they are told.
"""

import asyncio
import contextlib
import multiprocessing
import os
import pdb
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
CHUNK = b"x" * 10_000
BURN = f"import time\nuntil = time.monotonic() + {SECONDS}\nwhile time.monotonic() < until: pass"
TRICKLE = f"""
import sys, time
until = time.monotonic() + {SECONDS}
while time.monotonic() < until:
    sys.stdout.buffer.write(b"x" * 10_000)
    sys.stdout.buffer.flush()
    time.sleep(0.25)
"""


def burn(_: object = None) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        pass


def python(source: str, **options: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", source], **options)  # type: ignore[call-overload,no-any-return]


# Other processes work, and the main thread waits for them.


def process_pool() -> None:
    with multiprocessing.Pool(1) as pool:
        pool.map(burn, [0])


def process_pool_spawn() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(burn).result()


def subprocess_alone() -> None:
    python(BURN).wait()


def grandchild() -> None:
    subprocess.run(["sh", "-c", f"{sys.executable} -c '{BURN}' & wait"], check=True)


def forked_child() -> None:
    if (child := os.fork()) == 0:
        burn()
        os._exit(0)
    os.waitpid(child, 0)


def many_short_programs() -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        subprocess.run([sys.executable, "-S", "-c", "sum(range(10**5))"], check=True)


def stopped_child() -> None:
    """Somebody looks at a data loader's worker with a debugger."""
    with python("import time; time.sleep(600)") as child:
        child.send_signal(signal.SIGSTOP)
        time.sleep(SECONDS)
        child.kill()


# Other threads work.


def thread_pool() -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(burn, [0, 0]))


def sleep_in_the_main_loop() -> None:
    thread = threading.Thread(target=burn)
    thread.start()
    while thread.is_alive():
        time.sleep(0.1)


def lock_that_a_thread_holds() -> None:
    lock, taken = threading.Lock(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            burn()

    threading.Thread(target=hold).start()
    taken.wait()
    with lock:
        pass


def queue_of_a_thread() -> None:
    items = queue.Queue[None]()

    def fill() -> None:
        burn()
        items.put(None)

    threading.Thread(target=fill).start()
    items.get()


def event_loop_with_a_thread() -> None:
    async def work() -> None:
        await asyncio.to_thread(burn)

    asyncio.run(work())


# The main thread works, in odd ways.


def holding_the_gil() -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        sum(range(2 * 10**8))


def starved() -> None:
    os.nice(19)
    burn()


def compressing() -> None:
    import zlib

    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        zlib.compress(os.urandom(1 << 24), 9)


# Bytes move slowly, and hardly any processor is used.


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with here, there:
            yield here, there


def trickle(send: Callable[[bytes], object]) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        send(CHUNK)
        time.sleep(0.25)


def download() -> None:
    with connected() as (here, there):
        if (server := os.fork()) == 0:
            trickle(there.sendall)
            os._exit(0)
        there.close()
        while here.recv(1 << 16):
            pass
        os.waitpid(server, 0)


def upload() -> None:
    with connected() as (here, there):
        for one, option in ((here, socket.SO_SNDBUF), (there, socket.SO_RCVBUF)):
            one.setsockopt(socket.SOL_SOCKET, option, 4096)
        if (server := os.fork()) == 0:
            trickle(lambda chunk: there.recv(2 * len(chunk)))
            os._exit(0)
        there.close()
        with contextlib.suppress(OSError):
            while True:
                here.sendall(CHUNK)
        os.waitpid(server, 0)


def download_by_a_program() -> None:
    with tempfile.TemporaryFile() as file:
        python(TRICKLE, stdout=file.fileno()).wait()


def slow_source() -> None:
    with python(TRICKLE, stdout=subprocess.PIPE) as source:
        assert source.stdout
        while source.stdout.read(1 << 12):
            pass


def checkpoint_to_a_slow_disk() -> None:
    """FAKE: a pipe takes the bytes as slowly as such a disk."""
    reading, writing = os.pipe()
    if (disk := os.fork()) == 0:
        os.close(writing)
        trickle(lambda chunk: os.read(reading, len(chunk)))
        os._exit(0)
    os.close(reading)
    with contextlib.suppress(BrokenPipeError):
        while True:
            os.write(writing, CHUNK)
    os.waitpid(disk, 0)


# A person is at work.


def stopped_and_continued() -> None:
    own = os.getpid()
    python(f"import os, time; os.kill({own}, 19); time.sleep({SECONDS}); os.kill({own}, 18)")
    time.sleep(1)


def at_the_debugger() -> None:
    reading, writing = os.pipe()
    threading.Timer(SECONDS, lambda: os.write(writing, b"c\n")).start()
    debugger = pdb.Pdb(stdin=os.fdopen(reading), stdout=sys.stderr)
    debugger.set_trace()
    time.sleep(0.1)


def at_a_breakpoint() -> None:
    """Of a script whose stdin is somebody's terminal, as torch.distributed.breakpoint() has it."""
    reading, writing = os.pipe()
    os.dup2(reading, 0)
    threading.Timer(SECONDS, lambda: os.write(writing, b"c\n")).start()
    breakpoint()
    time.sleep(0.1)


# With torch.


def evaluation_on_one_rank() -> None:
    import torch

    model, until = torch.nn.Linear(256, 256), time.monotonic() + SECONDS
    with torch.no_grad():
        while time.monotonic() < until:
            model(torch.randn(256, 256)).sum().item()


def compilation() -> None:
    import torch

    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        torch._dynamo.reset()
        torch.compile(torch.nn.Sequential(*[torch.nn.Linear(8, 8)] * 8), backend="aot_eager")(torch.randn(8, 8)).sum()


def slow_data_loader() -> None:
    from torch.utils.data import DataLoader

    for _ in DataLoader(range(2), num_workers=1, collate_fn=burn):  # type: ignore[arg-type]
        break


def save_in_a_thread() -> None:
    import torch

    def save() -> None:
        until = time.monotonic() + SECONDS
        with tempfile.TemporaryDirectory() as folder:
            while time.monotonic() < until:
                torch.save(torch.randn(1 << 18), Path(folder, "step.pt"))

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()


def group_of_some(ranks: list[int]) -> None:
    import torch
    import torch.distributed as dist

    group, until = dist.new_group(ranks, use_local_synchronization=True), time.monotonic() + SECONDS
    going = torch.ones(1)
    while going.item():
        time.sleep(0.3)
        going = torch.tensor(float(time.monotonic() < until))
        dist.all_reduce(going, dist.ReduceOp.MIN, group=group)


def messages_first() -> None:
    import torch
    import torch.distributed as dist

    until, going = time.monotonic() + SECONDS, torch.ones(1)
    while going.item():
        time.sleep(0.3)
        going = torch.tensor([float(time.monotonic() < until)])
        dist.send(going, dist.get_rank() + 1)


def messages_second() -> None:
    import torch
    import torch.distributed as dist

    going = torch.ones(1)
    while going.item():
        dist.recv(going, dist.get_rank() - 1)


# What is told.


def idle_sleep() -> None:
    time.sleep(SECONDS)


def idle_with_an_idle_pool() -> None:
    with multiprocessing.Pool(2) as pool:
        pool.map(time.sleep, [SECONDS])


def idle_at_a_socket() -> None:
    with connected() as (here, _):
        here.settimeout(SECONDS)
        with contextlib.suppress(TimeoutError):
            here.recv(1)


def idle_in_a_loop() -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        time.sleep(0.2)


def idle_at_the_barrier() -> None:
    """The others come to it when they have done their work."""


if __name__ == "__main__":
    rank, kinds = int(os.environ["RANK"]), sys.argv[2:]
    if with_torch := "idle_at_the_barrier" in kinds:
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
    for kind in kinds[rank].split("+"):
        if kind == "group_of_some":
            group_of_some([number for number, each in enumerate(kinds) if each == kind])
        else:
            globals()[kind]()
        print(f"{kind} done", flush=True)
    if with_torch:
        torch.distributed.barrier()
