"""The real torchrun as the launcher's child, with shell scripts for workers: signals that come at a bad moment."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from app.engine.command import AGENT
from app.engine.outcome import Outcome
from app.engine.torchrun import Torchrun
from tests.native.ports import free_port

ONE_FAILS_THE_OTHER_TAKES_ITS_TIME = """
if [ $LOCAL_RANK = 1 ]; then exit 7; fi
trap 'sleep 2; exit 0' TERM
while true; do sleep 0.1; done
"""


def torchrun(folder: Path, script: str, *, nproc: int = 1, node: int = 0, nodes: int = 1, port: int = 0) -> Torchrun:
    command = [sys.executable, "-P", str(AGENT), f"--nnodes={nodes}", f"--nproc-per-node={nproc}"]
    command += [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port or free_port()}"]
    command += [f"--log-dir={folder}", "--tee=3", "--no-python", "/bin/sh", "-c", script]
    return Torchrun(command, os.environ)


def test_a_stop_while_torchrun_ends_its_workers_does_not_hide_why_one_had_failed(tmp_path: Path) -> None:
    engine = torchrun(tmp_path, ONE_FAILS_THE_OTHER_TAKES_ITS_TIME, nproc=2)
    outcome = asyncio.run(engine.watch(lambda: engine.process.send_signal(signal.SIGTERM)))
    assert outcome.code == 1
    assert [(each.rank, each.exitcode) for each in outcome.failures] == [(1, 7)]


async def until(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not happened():
            await asyncio.sleep(0.01)


def test_torchrun_is_left_to_tell_of_a_worker_that_died_before_it_has_looked_at_it(tmp_path: Path) -> None:
    script = f"touch {tmp_path}/started; while [ ! -e {tmp_path}/die ]; do sleep 0.05; done; exit 7"

    async def told() -> Outcome:
        engine = torchrun(tmp_path, script)
        watching = asyncio.create_task(engine.watch(lambda: None))
        await until((tmp_path / "started").exists)
        (worker,) = psutil.Process(engine.process.pid).children()
        # Stopped, it does not look at its worker, which it does ten times in a second.
        engine.process.send_signal(signal.SIGSTOP)
        (tmp_path / "die").touch()
        await until(lambda: worker.status() == psutil.STATUS_ZOMBIE)
        ending = asyncio.create_task(engine.end(gently=False, grace=2))
        await asyncio.sleep(0)
        engine.process.send_signal(signal.SIGCONT)
        outcome = await watching
        ending.cancel()
        return outcome

    assert [(each.rank, each.exitcode) for each in asyncio.run(told()).failures] == [(0, 7)]


def test_torchrun_that_is_done_and_waits_for_the_other_nodes_is_stopped_at_once(tmp_path: Path) -> None:
    async def told() -> Outcome:
        port = free_port()
        engine, other = (
            torchrun(tmp_path, f"touch {tmp_path}/{node}; {what}", node=node, nodes=2, port=port)
            for node, what in enumerate(("exit 0", "sleep 60"))
        )
        try:
            watching = asyncio.create_task(engine.watch(lambda: None))
            await until((tmp_path / "0").exists)
            await until((tmp_path / "1").exists)
            await until(lambda: not psutil.Process(engine.process.pid).children())
            ending = asyncio.create_task(engine.end(gently=True, grace=30))
            async with asyncio.timeout(3):
                outcome = await watching
            ending.cancel()
            return outcome
        finally:
            engine.kill()
            other.kill()

    outcome = asyncio.run(told())
    assert outcome.halted
    assert not outcome.failures
