"""Real ranks that stand still: what all nodes print, and that a job which works is left alone."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.native.launchers import Nodes, nodes

SCRIPTS = Path(__file__).parents[1] / "scripts"
BUSY = """
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
print("computes", flush=True)
until = time.monotonic() + 6
while time.monotonic() < until and dist.get_rank() == 1:
    torch.ones(200, 200) @ torch.ones(200, 200)
dist.all_reduce(torch.ones(1))
print("has computed", flush=True)
"""


def on_two_nodes(made: Nodes, *arguments: str) -> list[str]:
    """The whole line with the verdict, of both nodes."""
    launchers = made.start_all(*arguments)
    return [launcher.wait_for(r"no progress on any rank for \d+ s: (.*)", 60)[1] for launcher in launchers]


def test_a_rank_that_sleeps_before_a_collective_is_named_by_all_nodes_and_nobody_is_stopped(tmp_path: Path) -> None:
    script = (SCRIPTS / "hang_before_collective.py").read_text()
    with nodes(tmp_path, 2, script, NPROC_PER_NODE="2", HANG_REPORT="2") as made:
        told = on_two_nodes(made, "2", "6")
        assert told[0] == told[1]
        assert "rank 2 has not reached all_reduce #6; ranks 0, 1, 3 are blocked in it at script.py:19" in told[0]
        assert "rank 2 on node 1 (127.0.0.2) is at script.py:25, in load_batch: time.sleep(seconds)" in told[0]
        kept = json.loads((tmp_path / "node1/default/report/node1/stalls/rank2.json").read_text())
        assert "load_batch" in kept["stack"]
        assert [each["profiling_name"] for each in kept["recorder"]] == ["gloo:all_reduce"] * 5
        assert [launcher.end(60) for launcher in made.launchers] == [0, 0]


def test_a_rank_in_another_collective_is_named_and_hang_timeout_starts_all_again(tmp_path: Path) -> None:
    script = (SCRIPTS / "other_collective.py").read_text()
    with nodes(tmp_path, 2, script, NPROC_PER_NODE="2", HANG_TIMEOUT="4", HANG_REPORT="2", MAX_RESTARTS="1") as made:
        told = on_two_nodes(made)
        assert told[0] == told[1]
        assert "ranks 0, 2, 3 all_reduce #6 at script.py:18" in told[0]
        assert "rank 1 barrier #6 at script.py:24, in save_checkpoint: dist.barrier()" in told[0]
        for launcher in made.launchers:
            launcher.wait_for("the job hangs: no progress on any rank .* All nodes start again", 30)
            launcher.wait_for("round 2: ", 30)
        assert [launcher.end(90) for launcher in made.launchers] == [5, 5]


HOLDS_THE_GIL = """
import ctypes, os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 1:
    # From here on no other thread comes to a turn: first it computes, then it waits for the writer of a pipe.
    sys.setswitchinterval(1000)
    until = time.process_time() + 2
    while time.process_time() < until:
        pass
    ctypes.PyDLL(None).open(os.fsencode(sys.argv[1]), os.O_RDONLY)
dist.all_reduce(torch.ones(1))
open(sys.argv[2]).close()
"""


def test_a_rank_in_native_code_that_holds_the_gil_is_named_though_it_cannot_tell(tmp_path: Path) -> None:
    held, freed = tmp_path / "held", tmp_path / "freed"
    os.mkfifo(held)
    os.mkfifo(freed)
    with nodes(tmp_path, 2, HOLDS_THE_GIL, HANG_REPORT="2") as made:
        told = on_two_nodes(made, str(held), str(freed))
        assert "rank 1 has not reached all_reduce #2; rank 0 is blocked in it at script.py:12" in told[0]
        assert "rank 1 on node 1 (127.0.0.2) is at native code holding the GIL" in told[0]
        # Open in both directions a pipe has its writer.
        with held.open("rb+", buffering=0):
            for launcher in made.launchers:
                launcher.wait_for("progress resumed")
        with freed.open("rb+", buffering=0):
            assert [launcher.end(60) for launcher in made.launchers] == [0, 0]


SOMEWHERE_ELSE = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
pair = dist.new_group([1, 2])
dist.all_reduce(torch.ones(1))
if rank == 2:
    open(sys.argv[2]).close()
if sys.argv[1] == "sizes":
    dist.broadcast(torch.ones(10 * (1 + rank)), 2)
elif rank == 1:
    dist.all_reduce(torch.ones(1), group=pair)
dist.barrier()
"""


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("sizes", "broadcast #2 with different data: rank 0 with float32[10]; rank 1 with float32[20].*rank 2 has not"),
        ("groups", "rank 2 has not reached all_reduce #1 of process group 1; rank 1 is blocked in it at script.py:12"),
    ],
)
def test_sizes_and_groups_are_read_of_torchs_own_recorder(tmp_path: Path, kind: str, told: str) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    with nodes(tmp_path, 1, SOMEWHERE_ELSE, NPROC_PER_NODE="3", HANG_REPORT="2") as made:
        launcher = made.start(0, kind, str(held))
        line = launcher.wait_for(r"no progress on any rank for \d+ s: (.*)", 60)[1]
        assert re.search(told.replace("[", r"\["), line), line
        launcher.signal(signal.SIGTERM)
        assert launcher.end() == 143


TIMES_OUT = """
import datetime, time, torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=15))
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 1:
    time.sleep(60)
dist.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize("limit", ["2", "60"])
def test_after_torchs_own_time_out_the_verdict_names_the_collective_and_the_rank_that_did_not_come(
    tmp_path: Path, limit: str
) -> None:
    """Also where that comes before HANG_REPORT."""
    with nodes(tmp_path, 2, TIMES_OUT, HANG_REPORT=limit, MAX_RESTARTS="0") as made:
        made.start_all()
        for launcher in made.launchers:
            assert launcher.end(60) == 5
            assert "the job hung: no progress on any rank for" in launcher.said[-1]
            assert "rank 1 has not reached all_reduce #2" in launcher.said[-1]


ONE_ENDS = """
import os, sys
if os.environ["RANK"] == "0":
    open(sys.argv[1]).close()
"""


def test_a_rank_that_has_ended_while_another_stands_still_is_named(tmp_path: Path) -> None:
    """NCCL's peers do not notice that one of them has ended; gloo's do at once."""
    held = tmp_path / "held"
    os.mkfifo(held)
    with nodes(tmp_path, 2, ONE_ENDS, HANG_REPORT="2") as made:
        (line, _) = on_two_nodes(made, str(held))
        # torchrun may have ended, too, or not yet.
        assert re.search(r"rank 1 on node 1 \(127.0.0.2\) .* has ended|node 1 \(127.0.0.2\) had finished", line), line
        with held.open("rb+", buffering=0):
            assert [launcher.end(60) for launcher in made.launchers] == [0, 0]


RESTS_AT_THE_END = """
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 1:
    time.sleep(8)
"""


def test_a_rank_that_rests_after_the_others_have_finished_keeps_nobody_and_is_no_hang(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, RESTS_AT_THE_END, HANG_REPORT="2", HANG_TIMEOUT="3") as made:
        launchers = made.start_all()
        assert [launcher.end(60) for launcher in launchers] == [0, 0]
        assert all("no progress" not in each.text for each in launchers), "\n".join(each.text for each in launchers)


@pytest.mark.parametrize("limit", ["2", "0"])
def test_a_rank_that_computes_while_the_others_wait_is_no_hang_and_0_switches_the_watch_off(
    tmp_path: Path, limit: str
) -> None:
    script = BUSY if limit != "0" else BUSY.replace("torch.ones(200, 200) @ torch.ones(200, 200)", "time.sleep(1)")
    with nodes(tmp_path, 2, script, HANG_REPORT=limit) as made:
        began = time.monotonic()
        launchers = made.start_all()
        assert [launcher.end(60) for launcher in launchers] == [0, 0]
        assert time.monotonic() - began > 6
        assert all("no progress" not in each.text for each in launchers), "\n".join(each.text for each in launchers)
