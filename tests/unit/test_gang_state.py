"""What a launcher leaves on disk: its state for the health check, its ending for Docker's retry; what is progress."""

import asyncio
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from app.config.errors import UserError
from app.plan import Plan
from app.supervise import health, progress
from app.supervise.files import in_time
from app.supervise.node import down_link
from app.supervise.progress import Gained, first_line
from app.supervise.restart_guard import RETRY_WINDOW, read_final, write_final
from app.supervise.runtime_dir import one_job, running, runtime_dir
from app.supervise.state import NodeState
from tests.unit.launch_facts import machine, planned

IDENTITY = "0123456789abcdef" * 4
MOUNTS = f"612 600 8:1 /var/lib/docker/containers/{IDENTITY}/hostname /etc/hostname rw - ext4 /dev/sda1 rw\n"


def state(folder: Path, age: float = 0) -> Path:
    folder.mkdir()
    fields = {"state": "running", "round": 2, "progress": "step 7", "time": time.time() - age}
    (folder / "state.json").write_text(json.dumps(fields))
    return folder


def test_a_launcher_that_lives_is_healthy_and_tells_round_and_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert health.healthcheck([state(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == "running, round 2, last progress: step 7\n"


def test_a_launcher_whose_event_loop_hangs_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.healthcheck([state(tmp_path / "a"), state(tmp_path / "b", age=60)]) == 1
    assert "no heartbeat for 60 s" in capsys.readouterr().out


def test_without_a_launcher_or_with_a_broken_state_nothing_is_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert health.healthcheck([]) == 1
    (state(tmp_path / "a") / "state.json").write_text("{")
    assert health.healthcheck([tmp_path / "a"]) == 1
    assert capsys.readouterr().out == "no launcher is running\n" * 2


def test_the_state_file_follows_the_launcher(tmp_path: Path) -> None:
    async def live() -> list[dict[str, object]]:
        gained = Gained(text="step 3")
        kept = NodeState(planned(machine()), tmp_path, lambda: gained, dict, lambda: range(0))
        seen = list[dict[str, object]]()
        keeping = asyncio.ensure_future(kept.keep())
        for wanted in ("waiting", "running"):
            while (found := read_state(tmp_path)).get("state") != wanted:
                await asyncio.sleep(0.01)
            seen.append(found)
            kept.change("running", 4)
        keeping.cancel()
        return seen

    first, second = asyncio.run(asyncio.wait_for(live(), 5))
    assert (first["round"], first["progress"]) == (0, "step 3")
    assert (second["round"], second["progress"]) == (4, "step 3")


def read_state(folder: Path) -> dict[str, object]:
    try:
        return dict(json.loads((folder / "state.json").read_text()))
    except FileNotFoundError:
        return {}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_two_launchers_of_a_user_have_a_private_folder_each_and_leave_none(temporary: Path) -> None:
    with runtime_dir() as first, runtime_dir() as second:
        assert {first, second} == {*temporary.iterdir()} == {*running()}
        assert len({first, second}) == 2
        assert first.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []


def test_what_a_killed_launcher_left_is_removed_and_is_no_running_one(temporary: Path) -> None:
    left = temporary / f"torchrun-compose-{os.getuid()}-left"
    left.mkdir()
    (left / "state.json").touch()
    assert running() == []
    with runtime_dir() as folder:
        assert list(temporary.iterdir()) == [folder]


def test_a_link_or_a_folder_of_another_user_is_neither_used_nor_removed(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the temporary folder may put one there."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "precious").touch()
    prefix = f"torchrun-compose-{os.getuid()}-"
    (temporary / f"{prefix}link").symlink_to(own)
    with runtime_dir():
        assert (own / "precious").exists()
    # FAKE: this process is another user from here on, whose name somebody else has used.
    other = os.getuid() + 1
    foreign = temporary / f"torchrun-compose-{other}-foreign"
    foreign.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: other)
    with runtime_dir():
        assert foreign.exists()
        assert foreign not in running()


def test_without_a_temporary_folder_the_user_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="TMPDIR"), runtime_dir():
        pass


def a_plan(folder: Path) -> Plan:
    plan = planned(machine(), TRAIN_SCRIPT=__file__, RUN_DIR=str(folder))
    plan.log_dir.mkdir(parents=True)
    return plan


def test_a_second_job_in_the_same_folder_is_refused_with_both_fixes(tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    with one_job(plan), pytest.raises(UserError) as refused, one_job(plan):
        pass
    for named in (f"process {os.getpid()} ", "RUN_NAME", "MASTER_PORT"):
        assert named in refused.value.message
    with one_job(plan):
        pass


def test_progress_is_what_was_gained_and_not_a_file_that_is_written_again_and_again(tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    folder, gained = plan.script.checkpoint_dir, Gained()
    folder.mkdir(parents=True)

    def seen() -> str:
        gained.read(tmp_path, folder)
        return gained.text

    for name in (".tmp-step-1", "step-2.partial"):
        (folder / name).mkdir()
        assert seen() == ""
    (folder / "step-1").mkdir()
    assert seen() == "step-1"
    (folder / "gone").symlink_to("nowhere")
    (folder / "last.pt").touch()
    os.utime(folder / "last.pt", (4e9, 4e9))
    assert seen() == "last.pt"
    os.utime(folder / "last.pt", (5e9, 5e9))
    (folder / "step-1").rmdir()
    (folder / "step-1").mkdir()
    assert seen() == "last.pt"
    (folder / "step-2").mkdir()
    assert seen() == "step-2"


@pytest.mark.parametrize(
    ("before", "after", "gained"),
    [
        ("step 9", "step 10", True),
        ("step 9, loss 2.5", "step 9, loss 2.75", False),
        ("epoch 1 step 90", "epoch 2 step 3", True),
        ("step 9", "step 3", False),
        ("half done", "nearly done", True),
        ("step 9", "", False),
    ],
)
def test_a_progress_file_shows_a_gain_when_its_step_rises(
    tmp_path: Path, before: str, after: str, gained: bool
) -> None:
    known = Gained()
    for line in (before, after):
        (tmp_path / "progress").write_text(f"{line}\nsomething else {time.time()}\n")
        known.read(tmp_path, tmp_path / "checkpoints")
    assert known.text == (after if gained else before)


def test_of_a_progress_file_a_line_of_a_hundred_bytes_is_read_and_only_of_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for odd in ("pipe", ".", "nothing"):
        assert first_line(tmp_path / odd) is None
    with (tmp_path / "large").open("wb") as file:
        file.write(b"9" * 500)
        file.truncate(3 << 30)
    assert first_line(tmp_path / "large") == "9" * 100


def test_a_file_system_that_stalls_holds_up_no_heartbeat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    stalls, goes_on = threading.Event(), threading.Event()

    def stalled(self: Gained, *_: Path) -> None:
        stalls.set()
        goes_on.wait(10)
        self.text = "step 9"

    monkeypatch.setattr(Gained, "read", stalled)
    monkeypatch.setattr(progress, "PATIENCE", 0.3)

    async def live() -> tuple[float, str, str]:
        seen = progress.TrainingProgress(plan, tmp_path, print, lambda: 0)
        asked = time.monotonic()
        await seen.renew()
        waited, before = time.monotonic() - asked, seen.text
        goes_on.set()
        await seen.renew()
        return waited, before, seen.text

    waited, before, after = asyncio.run(live())
    assert stalls.is_set()
    assert waited < 2
    assert (before, after) == ("", "step 9")


def test_an_act_on_files_has_a_limit_and_its_error_is_the_callers(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TimeoutError):
        in_time((tmp_path / "pipe").read_text, 0.1)
    with pytest.raises(FileNotFoundError):
        in_time((tmp_path / "nothing").read_text, 5)
    assert in_time(lambda: 7, 5) == 7
    with (tmp_path / "pipe").open("w"):
        pass


def test_a_torchrun_that_somebody_has_stopped_is_told_of_once(tmp_path: Path) -> None:
    said = queue.Queue[str]()
    with subprocess.Popen(["sleep", "60"]) as engine:
        engine.send_signal(signal.SIGSTOP)
        progress.TrainingProgress(a_plan(tmp_path), tmp_path, said.put, lambda: engine.pid)
        assert f"kill -CONT {engine.pid}" in said.get(timeout=5)
        with pytest.raises(queue.Empty):
            said.get(timeout=2 * progress.READ_EVERY)
        engine.kill()


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


@pytest.mark.parametrize(("carrier", "down"), [("0", True), ("1", False), (None, False)])
def test_a_link_without_a_carrier_is_down_and_an_unknown_one_is_not(
    tmp_path: Path, carrier: str | None, *, down: bool
) -> None:
    if carrier is not None:
        (tmp_path / "sys/class/net/eth0").mkdir(parents=True)
        (tmp_path / "sys/class/net/eth0/carrier").write_text(f"{carrier}\n")
    assert bool(down_link("eth0", tmp_path)) == down
