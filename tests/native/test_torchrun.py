"""The real torchrun as the launcher's child, with shell scripts for workers: signals that come at a bad moment."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.engine.command import AGENT
from app.engine.outcome import Outcome
from app.engine.torchrun import Torchrun
from tests.native.ports import free_port

ONE_FAILS_THE_OTHER_TAKES_ITS_TIME = """
if [ $LOCAL_RANK = 1 ]; then exit 7; fi
trap 'sleep 2; exit 0' TERM
while true; do sleep 0.1; done
"""


def torchrun(
    folder: Path, script: str, *, nproc: int = 1, node: int = 0, nodes: int = 1, port: int = 0, agent: Path = AGENT
) -> Torchrun:
    command = [sys.executable, "-P", str(agent), f"--nnodes={nodes}", f"--nproc-per-node={nproc}"]
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


IMPATIENT = f"""
import runpy
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

torchs_own = LocalElasticAgent.__init__.__defaults__
LocalElasticAgent.__init__.__defaults__ = tuple(1 if each == 300 else each for each in torchs_own)
assert LocalElasticAgent.__init__.__defaults__ != torchs_own
runpy.run_path({str(AGENT)!r}, run_name="__main__")
"""
"""torchrun as the launcher runs it, where torch has one second of patience instead of 300."""


def test_nodes_that_end_long_after_each_other_all_end_well_and_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    agent, port = tmp_path / "agent.py", free_port()
    agent.write_text(IMPATIENT)

    async def told() -> list[Outcome]:
        engines = [
            torchrun(tmp_path, script, node=node, nodes=2, port=port, agent=agent)
            for node, script in enumerate(("exit 0", "sleep 4; exit 0"))
        ]
        try:
            return await asyncio.gather(*(engine.watch(lambda: None) for engine in engines))
        finally:
            for engine in engines:
                engine.kill()

    assert [outcome.code for outcome in asyncio.run(told())] == [0, 0]
    printed = "".join(capfd.readouterr())
    assert "exit barrier" not in printed
    assert "Traceback" not in printed
