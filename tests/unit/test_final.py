"""The marker that keeps Docker's restart policy from repeating a start whose verdict is final."""

import json
import time
from pathlib import Path

import pytest

from app.supervise.restart_guard import RETRY_WINDOW, forget_final, read_final, reserve_final, write_final

CONTAINER = "5e" * 32


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container as its own /proc shows it, with a folder for its runs."""
    (tmp_path / "proc/self").mkdir(parents=True)
    mount = f"729 723 254:0 /var/lib/docker/containers/{CONTAINER}/hostname /etc/hostname rw - ext4 /dev/vda rw\n"
    (tmp_path / "proc/self/mountinfo").write_text(mount)
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    return tmp_path


def test_a_container_that_starts_again_at_once_finds_how_it_ended(root: Path) -> None:
    write_final(5, "training failed", root)
    ending = read_final(root)
    assert ending is not None
    assert (ending.code, ending.text) == (5, "training failed")


def test_a_start_after_the_retry_window_runs_and_forgets_the_verdict(root: Path) -> None:
    write_final(5, "training failed", root)
    (marker,) = (root / "runs").iterdir()
    fields = json.loads(marker.read_text())
    marker.write_text(json.dumps({**fields, "time": time.time() - RETRY_WINDOW - 1}))
    assert read_final(root) is None
    assert not marker.exists()


def test_room_for_the_marker_is_taken_early_and_is_no_verdict(root: Path) -> None:
    reserve_final(root)
    (marker,) = (root / "runs").iterdir()
    room = marker.stat().st_size
    assert read_final(root) is None
    write_final(5, "ü" * 100_000, root)
    assert marker.stat().st_size == room, "a full disk gives no more"
    ending = read_final(root)
    assert ending is not None
    assert ending.text.startswith("üü")
    forget_final(root)
    assert read_final(root) is None


def test_another_container_does_not_find_it(root: Path) -> None:
    write_final(5, "training failed", root)
    mountinfo = root / "proc/self/mountinfo"
    mountinfo.write_text(mountinfo.read_text().replace(CONTAINER, "a7" * 32))
    assert read_final(root) is None


def test_a_torn_marker_and_a_machine_without_a_container_are_no_verdict(root: Path) -> None:
    write_final(5, "training failed", root)
    (marker,) = (root / "runs").iterdir()
    marker.write_text("{")
    assert read_final(root) is None
    (root / "proc/self/mountinfo").write_text("")
    write_final(5, "training failed", root)
    assert read_final(root) is None
