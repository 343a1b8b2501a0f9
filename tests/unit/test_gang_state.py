"""What a launcher leaves on disk: its state for the health check, its ending for Docker's retry; what is progress."""

import asyncio
import json
import os
import threading
import time
from pathlib import Path

import pytest

from app.plan import Plan
from app.supervise import health
from app.supervise import progress as looks
from app.supervise.progress import progress
from app.supervise.restart_guard import RETRY_WINDOW, read_final, write_final
from tests.unit.launch_facts import machine, planned

IDENTITY = "0123456789abcdef" * 4
MOUNTS = f"612 600 8:1 /var/lib/docker/containers/{IDENTITY}/hostname /etc/hostname rw - ext4 /dev/sda1 rw\n"


def state(folder: Path, name: str, pid: int, age: float = 0) -> None:
    fields = {"pid": pid, "state": "running", "round": 2, "progress": "step 7", "time": time.time() - age}
    (folder / f"torchrun-compose-{os.getuid()}-{name}-0.json").write_text(json.dumps(fields))


def test_a_launcher_that_lives_is_healthy_and_tells_round_and_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state(tmp_path, "a", os.getpid())
    assert health.healthcheck(tmp_path) == 0
    assert capsys.readouterr().out == "running, round 2, last progress: step 7\n"


def test_a_launcher_that_hangs_or_is_gone_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state(tmp_path, "gone", 2**22 + 1)
    assert health.healthcheck(tmp_path) == 1
    assert capsys.readouterr().out == "no launcher is running\n"
    state(tmp_path, "hangs", os.getpid(), age=60)
    assert health.healthcheck(tmp_path) == 1
    assert "no sign of life for 60 s" in capsys.readouterr().out


def test_a_broken_state_file_is_no_state(tmp_path: Path) -> None:
    (tmp_path / f"torchrun-compose-{os.getuid()}-a-0.json").write_text("{")
    assert health.healthcheck(tmp_path) == 1


def test_the_state_file_follows_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(health, "_folder", lambda: tmp_path)

    async def live() -> list[object]:
        path, change = health.keep_state("a", 1, lambda: "step 3")
        first = json.loads(path.read_text())
        change("running", 4)
        second = json.loads(path.read_text())
        return [first["state"], second["state"], second["round"], second["progress"]]

    assert asyncio.run(live()) == ["waiting", "running", 4, "step 3"]


def test_progress_is_a_new_checkpoint_and_not_one_that_is_torn_again_and_again(tmp_path: Path) -> None:
    plan = planned(machine(), TRAIN_SCRIPT=__file__, RUN_DIR=str(tmp_path))
    folder = plan.script.checkpoint_dir
    folder.mkdir(parents=True)
    assert progress(plan) == ""
    (folder / ".tmp-step-1").mkdir()
    (folder / "step-2.partial").mkdir()
    assert progress(plan) == ""
    (folder / "step-1").mkdir()
    assert progress(plan) == "step-1"
    (folder / "step-1" / "part").touch()
    assert progress(plan) == "step-1"
    (folder / "last.pt").touch()
    os.utime(folder / "last.pt", (4e9, 4e9))
    first = progress(plan)
    os.utime(folder / "last.pt", (4e9, 4e9 + 1))
    assert first != progress(plan)
    (tmp_path / "progress").write_text("step 12\nloss 2.9\n")
    assert progress(plan) == "step 12"


def test_a_file_system_that_stalls_holds_up_no_heartbeat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = planned(machine(), TRAIN_SCRIPT=__file__, RUN_DIR=str(tmp_path))
    seen = looks.Looks(plan)
    stalls = threading.Event()

    def stalled(_: Plan) -> str:
        stalls.wait(10)
        return "step 9"

    monkeypatch.setattr(looks, "progress", stalled)
    monkeypatch.setattr(looks, "PATIENCE", 0.3)

    async def live() -> tuple[float, str, str]:
        asked = time.monotonic()
        await seen.renew()
        waited, before = time.monotonic() - asked, seen.progress
        stalls.set()
        await seen.renew()
        return waited, before, seen.progress

    waited, before, after = asyncio.run(live())
    assert waited < 2
    assert (before, after) == ("", "step 9")


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FAKE: the root of a container whose id Docker shows in its mounts."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(MOUNTS)
    return tmp_path


def test_docker_own_retry_finds_how_the_container_ended(container: Path) -> None:
    write_final(4, "the nodes do not agree", container)
    for _ in range(5):
        ending = read_final(container)
        assert ending is not None
        assert (ending.code, ending.text) == (4, "the nodes do not agree")


def test_a_later_start_by_hand_runs_and_forgets(container: Path) -> None:
    write_final(4, "the nodes do not agree", container)
    [marker] = container.glob(".final-*")
    fields = json.loads(marker.read_text())
    marker.write_text(json.dumps({**fields, "time": fields["time"] - RETRY_WINDOW - 1}))
    assert read_final(container) is None
    assert not list(container.glob(".final-*"))


def test_outside_a_container_nothing_is_left(tmp_path: Path) -> None:
    write_final(4, "the nodes do not agree", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert read_final(tmp_path) is None
