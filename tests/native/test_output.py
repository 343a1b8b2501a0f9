"""What a script prints under the launcher: whole lines, nothing lost, and never the end of the training."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.launchers import nodes

PRINTS = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
for step in range(200):
    sys.stderr.write(f"\\r{step}%|####")
    dist.all_reduce(torch.ones(1))
sys.stderr.write("\\r100%|####\\n")
dist.destroy_process_group()
sys.stdout.write(f"the last word of rank {os.environ['RANK']}")
"""
FLOODS = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
for step in range(40):
    print("x" * 99999)
    dist.all_reduce(torch.ones(1))
print(f"rank {rank} trained on", flush=True)
dist.destroy_process_group()
"""


FILLS = """
import os, sys
from pathlib import Path
mark = Path("filled")
if mark.exists():
    print("trains on a full disk", flush=True)
else:
    mark.touch()
    try:
        for number in range(1000):
            Path(os.environ["RUN_DIR"], str(number)).touch()
    except OSError as error:
        sys.exit(f"{error}")
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte and 200 files."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root to mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=200", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_progress_bar_is_a_line_and_the_last_word_needs_no_end(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, PRINTS) as job:
        launchers = job.start_all()
        assert [launcher.end(60) for launcher in launchers] == [0, 0]
    for rank, launcher in enumerate(launchers):
        lines = launcher.text.splitlines()
        assert f"[rank {rank}] 100%|####" in lines
        assert f"[rank {rank}] the last word of rank {rank}" in lines
        assert sum("|####" in line for line in lines) < 5
        assert "hostname of the client socket" not in launcher.text


def test_a_full_disk_costs_the_logs_and_not_the_run(tmp_path: Path, small_disk: Path) -> None:
    with nodes(tmp_path, 2, FLOODS) as job:
        first = job.start(0, RUNS_ROOT=str(small_disk))
        second = job.start(1)
        assert [first.end(60), second.end(60)] == [0, 0], first.text[-2000:]
    assert first.text.count("No space left on device") == 1
    assert "rank 0 trained on" in first.text
    assert first.text.count("x" * 99999) == 40
    kept = [path for path in (tmp_path / "node1").rglob("stdout.log") if path.stat().st_size]
    assert kept
    assert "rank 1 trained on" in kept[0].read_text()


FLOODED = """
import os, sys, time
from pathlib import Path
rank, done = os.environ["RANK"], Path("done")
def steps():
    begun = time.monotonic()
    for step in range(300):
        time.sleep(0.005)
        print("step", step, "x" * 500, flush=True)
    return time.monotonic() - begun
if rank == "1":
    alone = steps()
    Path("flood").touch()
    while not Path("flooding").exists():
        time.sleep(0.01)
    beside = steps()
    done.touch()
    Path("steps").write_text(f"{alone} {beside}")
else:
    while not Path("flood").exists():
        time.sleep(0.01)
    line, count, begun = "y" * 1000 + "\\n", 0, time.monotonic()
    while not done.exists():
        sys.stdout.write(line * 1000)
        count += 1
        if count == 20:
            Path("flooding").touch()
    Path("rate").write_text(str(count / (time.monotonic() - begun)))
"""


def test_a_rank_that_prints_all_it_can_slows_no_other(tmp_path: Path) -> None:
    """Each step of the other sleeps and prints half a kilobyte, so that it has a processor when it asks for one."""
    with nodes(tmp_path, 1, FLOODED, NPROC_PER_NODE="2") as job:
        job.output = subprocess.DEVNULL
        assert job.start(0).end(120) == 0
    alone, beside = map(float, (tmp_path / "steps").read_text().split())
    megabytes = float((tmp_path / "rate").read_text())
    print(f"{megabytes:.0f} MB/s of prints: 300 steps took {beside:.2f} s, {alone:.2f} s without")
    assert beside < 2 * alone


def test_a_round_begins_where_there_is_no_room_for_its_logs(tmp_path: Path, small_disk: Path) -> None:
    with nodes(tmp_path, 1, FILLS) as job:
        launcher = job.start(0, RUNS_ROOT=str(small_disk))
        assert launcher.end(90) == 0, launcher.text[-3000:]
    assert "[rank 0] trains on a full disk" in launcher.text.splitlines()


def test_what_outlives_a_killed_rank_in_its_pipe_is_still_printed(tmp_path: Path) -> None:
    script = "import os, time\nprint('said before the end', flush=True)\nos.kill(os.getpid(), 9)\n"
    with nodes(tmp_path, 1, script, MAX_RESTARTS="0") as job:
        launcher = job.start(0)
        began = time.monotonic()
        assert launcher.end(60) != 0
        assert time.monotonic() - began < 50
    assert "[rank 0] said before the end" in launcher.text.splitlines()
    assert signal.SIGKILL.name in launcher.text
