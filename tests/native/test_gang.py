"""Two and three real launchers with real torchrun and gloo on this machine: they start, fail, restart and stop as one.

Only real processes show that nothing is left running, and only several launchers show that all say the same.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.native.launchers import ALL_REDUCE, PROJECT, Launcher, nodes

FOREVER = "100000"

FAILS_ONCE = """
import os, signal, sys, time, torch, torch.distributed as dist
from pathlib import Path
dist.init_process_group("gloo")
marks = Path(os.environ["CHECKPOINT_DIR"])
marks.mkdir(parents=True, exist_ok=True)
for step in range(30):
    dist.all_reduce(torch.ones(1))
    time.sleep(0.02)
    if step == 10 and dist.get_rank() == 1 and not list(marks.iterdir()):
        (marks / "step_10").touch()
        os.kill(os.getpid(), signal.SIGKILL)
print("trained", flush=True)
"""

ALWAYS_DIES = """
import os, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
for step in range(100):
    dist.all_reduce(torch.ones(1))
    if step == 5 and dist.get_rank() == 1:
        os._exit(3)
"""

ALWAYS_FAILS = """
import os, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
for step in range(100):
    dist.all_reduce(torch.ones(1))
    if step == 5 and dist.get_rank() == 1:
        raise ValueError("bad batch")
"""

SAVES_WHEN_STOPPED = """
import os, signal, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
for step in range(100000):
    stop = torch.tensor(float(bool(stopped)))
    dist.all_reduce(stop)
    if step == 3:
        print("trains", flush=True)
    if stop.item():
        print("saved", flush=True)
        sys.exit(143)
    time.sleep(0.02)
"""


def ends(launchers: list[Launcher], seconds: float = 40) -> list[int]:
    return [launcher.end(seconds) for launcher in launchers]


def test_two_nodes_started_apart_train_with_ranks_in_list_order_and_both_end_with_0(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE, NPROC_PER_NODE="2") as job:
        second = job.start(1, "10")
        second.wait_for(r"waiting \d+ s for node 0, 127\.0\.0\.1 port \d+: connection refused \(until")
        first = job.start(0, "10")
        assert ends([first, second]) == [0, 0]
    places = [found for one in (first, second) for found in sorted(one.text.splitlines()) if "trains: rank" in found]
    expected = [f"rank {rank} of 4, place [{rank // 2}, {rank % 2}, 2]" for rank in range(4)]
    assert [place.partition("trains: ")[2].partition(", pid")[0] for place in places] == expected
    assert "done: all workers of 2 nodes ended well" in first.said
    assert "done: all workers of 2 nodes ended well" in second.said


def test_the_exception_of_one_worker_is_the_last_line_on_both_nodes(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALWAYS_FAILS, MAX_RESTARTS="0") as job:
        launchers = job.start_all()
        assert ends(launchers) == [5, 5]
    told = {launcher.said[-1] for launcher in launchers}
    assert len(told) == 1
    assert told.pop().startswith("node 1 (127.0.0.2) - rank 1 failed with ValueError: bad batch (")
    traceback = launchers[1].text
    assert traceback.index('raise ValueError("bad batch")') < traceback.index("rank 1 failed with ValueError")
    assert "ChildFailedError" not in traceback


def test_three_failures_in_a_row_end_the_job_and_say_that_there_was_no_progress(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALWAYS_DIES, MAX_RESTARTS="2") as job:
        launchers = job.start_all()
        assert ends(launchers, 60) == [5, 5]
    for launcher in launchers:
        assert "3 failures in a row without a new checkpoint (MAX_RESTARTS=2)" in launcher.said[-1]
        again = [line.partition("All nodes start again ")[2] for line in launcher.said if "All nodes start" in line]
        assert again == ["(restart 1 of 2)", "in 1 s (restart 2 of 2)"], "only the first restart comes at once"


def test_the_same_error_at_the_same_place_twice_without_progress_ends_the_job(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALWAYS_FAILS, MAX_RESTARTS="5") as job:
        launchers = job.start_all()
        assert ends(launchers, 60) == [5, 5]
    for launcher in launchers:
        assert "rank 1 failed with ValueError: bad batch" in launcher.said[-1]
        assert "The same error at the same place twice" in launcher.said[-1]
        assert sum("All nodes start again" in line for line in launcher.said) == 1


STUCK = """
import os, signal, torch, torch.distributed as dist
dist.init_process_group("gloo")
last = os.path.join(os.environ["CHECKPOINT_DIR"], "last.pt")
start = torch.load(last) if os.path.exists(last) else 0
print("begins at", start, flush=True)
for step in range(start, 10):
    dist.barrier()
    if dist.get_rank() == 0:
        torch.save(step, last)
    dist.barrier()
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_checkpoint_that_is_written_again_at_the_same_step_is_no_progress(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, STUCK, MAX_RESTARTS="2") as job:
        launchers = job.start_all()
        assert ends(launchers, 90) == [5, 5]
    for launcher in launchers:
        assert "3 failures in a row without a new checkpoint (MAX_RESTARTS=2)" in launcher.said[-1]
        begun = re.findall(r"begins at (\d)", launcher.text)
        assert begun == ["0", "3", "3"]


def test_a_wrong_call_while_the_model_is_built_ends_the_job_after_the_second_round(tmp_path: Path) -> None:
    script = "from torch import nn\ndef build():\n    return nn.Linear(in_features=3)\nbuild()\n"
    with nodes(tmp_path, 2, script, MAX_RESTARTS="5") as job:
        launchers = job.start_all()
        assert ends(launchers, 90) == [5, 5]
    for launcher in launchers:
        assert "failed with TypeError: " in launcher.said[-1]
        assert sum("All nodes start again" in line for line in launcher.said) <= 1


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (
            "try: raise ValueError('bad batch')\n        except Exception as error: print(error); sys.exit(1)",
            "bad batch",
        ),
        ("print('MyError: no such shard', file=sys.stderr); sys.exit(1)", "no such shard"),
    ],
)
def test_a_script_that_prints_its_error_and_leaves_with_1_is_blamed_with_its_words(
    tmp_path: Path, end: str, words: str
) -> None:
    lines = ALWAYS_FAILS.replace('raise ValueError("bad batch")', end).replace("import os,", "import os, sys,")
    with nodes(tmp_path, 2, lines, MAX_RESTARTS="0") as job:
        launchers = job.start_all()
        assert ends(launchers, 60) == [5, 5]
    for launcher in launchers:
        assert launcher.said[-1].startswith("node 1 (127.0.0.2) - rank 1 failed with ")
        assert words in launcher.said[-1]


def test_ranks_that_are_killed_together_are_all_named_and_none_followed(tmp_path: Path) -> None:
    dies = "import os, signal, time\ntime.sleep(1 - time.time() % 1)\nos.kill(os.getpid(), signal.SIGKILL)"
    with nodes(tmp_path, 2, dies, MAX_RESTARTS="0") as job:
        launchers = job.start_all()
        assert ends(launchers, 60) == [5, 5]
    for launcher in launchers:
        assert "node 0 (127.0.0.1) - rank 0 was ended by SIGKILL" in launcher.said[-1]
        assert "node 1 (127.0.0.2) - rank 1 was ended by SIGKILL" in launcher.said[-1]
        assert "as a result" not in launcher.said[-1]


@pytest.mark.parametrize("watch", ["60", "0"])
def test_a_rank_that_finished_early_is_told_as_unequal_numbers_of_steps(tmp_path: Path, watch: str) -> None:
    """Without a watch, too, which knows the last collective."""
    unequal = """
import os, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
for step in range(3 if dist.get_rank() else 6):
    if step == 3:
        time.sleep(4)
    dist.all_reduce(torch.ones(1))
"""
    with nodes(tmp_path, 2, unequal, MAX_RESTARTS="0", HANG_REPORT=watch) as job:
        launchers = job.start_all()
        assert ends(launchers, 60) == [5, 5]
    for launcher in launchers:
        assert launcher.said[-1].startswith("node 0 (127.0.0.1) - rank 0 failed with ")
        assert "node 1 (127.0.0.2) had finished after" in launcher.said[-1]
        assert "unequal numbers of batches or steps" in launcher.said[-1]


def test_a_script_that_ends_well_because_it_is_told_to_had_not_finished_early(tmp_path: Path) -> None:
    obeys = """
import signal, sys, time, torch, torch.distributed as dist
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0:
    raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.2]:39558")
time.sleep(60)
"""
    with nodes(tmp_path, 2, obeys, MAX_RESTARTS="0") as job:
        launchers = job.start_all()
        assert ends(launchers, 60) == [5, 5]
    for launcher in launchers:
        assert launcher.said[-1].startswith("cause unclear: node 0 (127.0.0.1) - rank 0 failed with ")
        assert "had finished" not in launcher.said[-1]


def test_a_node_that_its_own_settings_refuse_is_known_to_the_others_at_once(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, ALL_REDUCE) as job:
        first, second = job.start(0, "10"), job.start(1, "10")
        for launcher in (first, second):
            launcher.wait_for(r"waiting \d+ s for node 2")
        third = job.start(2, "10", NPROC_PER_NODE="many")
        assert third.end() == 2
        for launcher in (first, second):
            launcher.wait_for(r"node 2 \(127\.0\.0\.3\) was turned away: it cannot start: .*NPROC_PER_NODE=many", 5)
            launcher.wait_for(r"waiting \d+ s for node 2 \(127\.0\.0\.3\): it cannot start: .*NPROC_PER_NODE=many", 15)
        fixed = job.start(2, "10")
        assert ends([first, second, fixed]) == [0, 0, 0]


def test_a_killed_worker_is_named_with_its_signal_and_the_next_round_trains_to_the_end(tmp_path: Path) -> None:
    shared = str(tmp_path / "checkpoints")
    with nodes(tmp_path, 2, FAILS_ONCE, MAX_RESTARTS="1", CHECKPOINT_DIR=shared) as job:
        launchers = job.start_all()
        assert ends(launchers) == [0, 0]
    for launcher in launchers:
        told = next(line for line in launcher.said if "All nodes start again" in line)
        assert told.startswith("node 1 (127.0.0.2) - rank 1 was ended by SIGKILL")
        assert "trained" in launcher.text


def test_a_killed_torchrun_takes_its_workers_with_it_and_is_named_within_two_seconds(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE, MAX_RESTARTS="0") as job:
        first, second = job.start_all(FOREVER)
        second.wait_for("trains: rank 1")
        workers = second.workers()
        assert workers
        killed = time.monotonic()
        second.agents()[0].kill()
        assert ends([first, second]) == [5, 5]
        assert first.when("stopping local workers") - killed < 2
        gone, alive = psutil.wait_procs(workers, 2)
        assert gone
        assert not alive
    assert first.said[-1] == second.said[-1]
    assert first.said[-1].startswith("node 1 (127.0.0.2) - torchrun was ended by SIGKILL")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_launcher_leaves_no_orphan_and_rejoins_when_it_is_started_again(tmp_path: Path, victim: int) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE) as job:
        launchers = job.start_all(FOREVER)
        dead, survivor = launchers[victim], launchers[1 - victim]
        survivor.wait_for("trains: rank")
        workers = [*dead.agents(), *dead.workers()]
        killed = time.monotonic()
        dead.signal(signal.SIGKILL)
        survivor.wait_for(rf"node {victim} \(127.0.0.{victim + 1}\) was lost")
        assert survivor.when("was lost") - killed < 2
        assert not psutil.wait_procs(workers, 5)[1]
        again = job.start(victim, FOREVER)
        again.wait_for(r"round 2: node rank \d of 2")
        again.wait_for("trains: rank")
        again.signal(signal.SIGTERM)
        assert ends([again, survivor]) == [143, 143]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stop_on_one_node_lets_the_scripts_of_all_nodes_save_and_ends_all_as_stopped(
    tmp_path: Path, stopped: int
) -> None:
    with nodes(tmp_path, 2, SAVES_WHEN_STOPPED, STOPPED_EXIT_CODE="0") as job:
        launchers = job.start_all()
        launchers[1].wait_for("trains")
        launchers[stopped].signal(signal.SIGTERM)
        codes = ends(launchers)
    assert codes[stopped] == 143
    assert codes[1 - stopped] == 0, "its engine must not start it again"
    for launcher in launchers:
        assert "saved" in launcher.text
        assert launcher.said[-1] == f"stopped on node {stopped} (127.0.0.{stopped + 1}) before the training was done"


def test_a_second_interrupt_ends_a_stubborn_script_at_once_and_the_other_node_stops_too(tmp_path: Path) -> None:
    stubborn = ALL_REDUCE.replace(
        "import os,", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nimport os,"
    )
    with nodes(tmp_path, 2, stubborn, STOP_GRACE="3") as job:
        first, second = job.start_all(FOREVER)
        second.wait_for("trains: rank 1")
        second.signal(signal.SIGINT)
        first.wait_for("stopped on node 1")
        second.signal(signal.SIGINT)
        asked = time.monotonic()
        assert second.end() == 143
        assert time.monotonic() - asked < 2
        assert first.end() == 143


def test_scripts_that_do_not_stop_are_waited_for_aloud_and_killed_after_their_grace(tmp_path: Path) -> None:
    stubborn = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('stubborn', flush=True)\ntime.sleep(600)"
    with nodes(tmp_path, 2, stubborn, STOP_GRACE="3") as job:
        first, second = job.start_all()
        for launcher in (first, second):
            launcher.wait_for("stubborn")
        second.signal(signal.SIGTERM)
        first.wait_for("stopping local workers")
        command = [sys.executable, str(PROJECT / "entrypoint.py"), "healthcheck"]
        health = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert "stopping, round 1, no progress yet" in health.stdout
        assert ends([first, second], 20) == [143, 143]
    for launcher in (first, second):
        launcher.wait_for(r"waiting \d s for node 0 \(127\.0\.0\.1\); node 1 \(127\.0\.0\.2\) to end \(until", 1)


def test_a_stop_while_waiting_for_a_node_ends_those_that_wait(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, ALL_REDUCE) as job:
        first, second = job.start(0, "10"), job.start(1, "10")
        for launcher in (first, second):
            launcher.wait_for(r"waiting \d+ s for node 2 \(127\.0\.0\.3\): connection refused.*2 of 3 nodes connected")
        second.signal(signal.SIGTERM)
        assert ends([first, second]) == [143, 143]


def test_a_stop_while_the_gang_restarts_ends_all(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE) as job:
        first, second = job.start_all(FOREVER)
        first.wait_for("trains: rank 0")
        second.signal(signal.SIGKILL)
        first.wait_for(r"waiting \d+ s for node 1")
        first.signal(signal.SIGTERM)
        assert first.end() == 143


def test_a_node_that_never_comes_is_named_when_the_start_timeout_is_over(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE, START_TIMEOUT="3") as job:
        first = job.start(0, "10")
        assert first.end() == 3
    assert "timed out after 3 s (START_TIMEOUT) waiting for node 1 (127.0.0.2): connection refused" in first.said[-1]


def test_a_lost_node_that_does_not_come_back_is_named_with_what_happened(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE, REJOIN_TIMEOUT="3") as job:
        first, second = job.start_all(FOREVER)
        first.wait_for("trains: rank 0")
        second.signal(signal.SIGKILL)
        assert first.end() == 6
    assert first.said[-1].startswith("node 1 (127.0.0.2) was lost: its connection closed")
    assert "timed out after 3 s (REJOIN_TIMEOUT) waiting for node 1" in first.said[-1]


def test_with_min_nodes_the_job_goes_on_without_a_lost_node_and_takes_it_back_in_the_next_round(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, ALL_REDUCE, MIN_NODES="2", REJOIN_TIMEOUT="3", REGROW="failure") as job:
        launchers = job.start_all(FOREVER)
        launchers[0].wait_for("trains: rank 0 of 3")
        launchers[1].signal(signal.SIGKILL)
        launchers[2].wait_for("going on without node 1")
        launchers[2].wait_for(r"trains: rank 1 of 2, place \[1, 0, 1\]")
        back = job.start(1, FOREVER)
        back.wait_for("round 2 runs without this node; it joins the next one")
        launchers[2].workers()[0].kill()
        back.wait_for("trains: rank 1 of 3")
        back.signal(signal.SIGTERM)
        assert ends([launchers[0], launchers[2], back]) == [143, 143, 143]


def test_a_spare_takes_a_lost_nodes_place_at_once_and_the_lost_node_is_the_spare_then(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, ALL_REDUCE, SPARES="1") as job:
        launchers = job.start_all(FOREVER)
        launchers[1].wait_for(r"trains: rank 1 of 2, place \[1, 0, 1\]")
        launchers[2].wait_for("round 1 runs without this node; it is a spare")
        assert not launchers[2].workers()
        killed = time.monotonic()
        launchers[1].signal(signal.SIGKILL)
        launchers[2].wait_for(r"trains: rank 1 of 2, place \[1, 0, 1\]")
        # The others wait for nobody: HEARTBEAT_TIMEOUT is 8 s, REJOIN_TIMEOUT 120 s.
        assert time.monotonic() - killed < 60
        assert "node 2 (127.0.0.3) takes the place of node 1 (127.0.0.2)" in launchers[0].text
        back = job.start(1, FOREVER)
        back.wait_for("round 2 runs without this node; it is a spare")
        launchers[2].signal(signal.SIGKILL)
        back.wait_for(r"trains: rank 1 of 2, place \[1, 0, 1\]")
        back.signal(signal.SIGTERM)
        assert ends([launchers[0], back]) == [143, 143]


def test_a_node_that_comes_back_is_let_in_at_the_next_checkpoint(tmp_path: Path) -> None:
    script = ALL_REDUCE.replace(
        "    time.sleep(0.05)",
        '    open(f"{os.environ[\'RUN_DIR\']}/progress", "w").write(str(step))\n    time.sleep(0.05)',
    )
    with nodes(tmp_path, 3, script, MIN_NODES="2", REJOIN_TIMEOUT="3") as job:
        launchers = job.start_all(FOREVER)
        launchers[0].wait_for("trains: rank 0 of 3")
        launchers[1].signal(signal.SIGKILL)
        launchers[2].wait_for(r"trains: rank 1 of 2, place \[1, 0, 1\]")
        back = job.start(1, FOREVER)
        back.wait_for("round 2 runs without this node; it joins the next one at the next checkpoint")
        back.wait_for("trains: rank 1 of 3")
        assert "node 1 (127.0.0.2) joins at this checkpoint" in launchers[0].text
        assert "restart 2 of" not in launchers[0].text
        back.signal(signal.SIGTERM)
        assert ends([launchers[0], launchers[2], back]) == [143, 143, 143]


def test_two_nodes_with_one_rank_are_both_named_at_once(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, ALL_REDUCE) as job:
        first, second = job.start(0, "10"), job.start(1, "10")
        first.wait_for(r"waiting \d+ s")
        twin = job.start(2, "10", NODE_RANK="1")
        assert ends([second, twin]) == [4, 4]
        first.wait_for("waiting up to 10 s to deliver the verdict to node 2")
        first.signal(signal.SIGINT)
        assert first.end(5) == 4
    assert first.said[-1] == second.said[-1] == twin.said[-1]
    assert "two nodes say they are node 1: 127.0.0." in first.text


@pytest.mark.parametrize(
    ("setting", "value", "row"),
    [
        ("NPROC_PER_NODE", "2", r"NPROC_PER_NODE +1 \(node 0\) +2 \(node 1\)"),
        ("NODES", "127.0.0.1,127.0.0.2,127.0.0.3", r"NNODES +2 \(node 0\) +3 \(node 1\)"),
    ],
)
def test_a_setting_that_differs_is_refused_with_a_table(tmp_path: Path, setting: str, value: str, row: str) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE) as job:
        launchers = [job.start(0, "10"), job.start(1, "10", **{setting: value})]
        assert ends(launchers) == [4, 4]
    for launcher in launchers:
        launcher.wait_for("the nodes do not agree; nothing was started")
        launcher.wait_for(row, 1)


def test_a_master_port_in_use_is_waited_for_a_moment_and_a_stop_ends_the_wait_at_once(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE) as job, socket.socket() as other:
        port = int(job.settings["MASTER_PORT"])
        other.bind(("127.0.0.1", port))
        other.listen()
        first = job.start(0, "10")
        first.wait_for(rf"cannot listen on 127\.0\.0\.1 port {port} \(MASTER_PORT\): address already in use")
        first.signal(signal.SIGTERM)
        assert first.end(8) == 143


@pytest.mark.parametrize("setting", ["MASTER_PORT", "CONTROL_PORT"])
def test_a_port_of_node_0_that_stays_in_use_is_refused_on_all_nodes_with_its_holder(
    tmp_path: Path, setting: str
) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE) as job, socket.socket() as other:
        port = int(job.settings["MASTER_PORT"]) + (setting == "CONTROL_PORT")
        other.bind(("127.0.0.1", port))
        other.listen()
        started = time.monotonic()
        launchers = [job.start(0, "10")]
        if setting == "MASTER_PORT":
            launchers.append(job.start(1, "10"))
        assert ends(launchers, 25) == [2] * len(launchers)
        assert time.monotonic() - started < 15
    for launcher in launchers:
        told = f"node 0 cannot listen on 127.0.0.1 port {port} ({setting}): process {os.getpid()} ("
        assert launcher.said[-1].startswith(told)
        assert launcher.said[-1].endswith(") has it. Fix: end that, or set another MASTER_PORT on all nodes.")


def test_a_port_that_another_job_of_this_machine_has_on_any_address_is_refused_on_a_single_node(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, ALL_REDUCE) as job, socket.socket() as other:
        other.bind(("127.0.0.9", int(job.settings["MASTER_PORT"])))
        other.listen()
        launcher = job.start(0, "10")
        assert ends([launcher], 25) == [2]
    assert launcher.said[-1].endswith(") has it. Fix: end that, or set another MASTER_PORT on all nodes.")
    assert "Traceback" not in launcher.text


@pytest.mark.parametrize(
    ("script", "what", "why"),
    [
        (
            "import argparse\nargparse.ArgumentParser().parse_args(['--no-such'])",
            "ended with exit code 2",
            "TRAIN_ARGS",
        ),
        ("import no_such_module", "failed with ModuleNotFoundError: No module named 'no_such_module'", "cannot start"),
        ("if True print()", "failed with SyntaxError: ", "cannot start"),
    ],
)
def test_what_another_try_cannot_cure_ends_the_job_at_once(tmp_path: Path, script: str, what: str, why: str) -> None:
    with nodes(tmp_path, 2, script) as job:
        launchers = job.start_all()
        assert ends(launchers) == [5, 5]
    for launcher in launchers:
        assert re.match(rf"node \d \(127\.0\.0\.\d\) - rank \d {what}", launcher.said[-1])
        assert why in launcher.said[-1]
        assert launcher.said[-1].endswith("Not started again, since it would end the same way.")
        assert "start again" not in launcher.text


def test_a_script_that_got_on_before_is_tried_again_whatever_it_ends_with(tmp_path: Path) -> None:
    gets_on = (
        "import os, pathlib, sys\nmark = pathlib.Path(os.environ['RUN_DIR'], 'progress')\n"
        "tries = len(mark.read_text()) if mark.exists() else 0\n"
        "mark.write_text('.' * min(tries + 1, 2))\nsys.exit(2 if tries < 3 else 0)"
    )
    with nodes(tmp_path, 1, gets_on, NODES="", NODE_RANK="", MAX_RESTARTS="1") as job:
        launcher = job.start(0)
        assert launcher.end(40) == 5
    assert sum("start again" in line for line in launcher.said) == 2
    assert "failures in a row without a new checkpoint" in launcher.said[-1]


def test_a_node_that_comes_after_a_refusal_is_told_the_same(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, ALL_REDUCE) as job:
        first, second = job.start(0, "10"), job.start(1, "10", NPROC_PER_NODE="2")
        first.wait_for(r"waiting up to 10 s to deliver the verdict to node 2 \(127\.0\.0\.3\)")
        first.wait_for("NPROC_PER_NODE +1", 5)
        late = job.start(2, "10")
        assert ends([first, second, late]) == [4, 4, 4]
    assert first.said[-2:] == second.said[-2:] == late.said[-2:]


def test_another_job_on_the_port_is_told_apart_and_not_disturbed(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, ALL_REDUCE) as job:
        first = job.start(0, "10")
        stranger = job.start(1, "10", RUN_NAME="other")
        assert stranger.end() == 4
        assert "belongs to another job, run 'default'; this node's is 'other'" in stranger.said[-1]
        second = job.start(1, "10")
        assert ends([first, second]) == [0, 0]


def test_a_wrong_token_is_refused_before_a_word_and_the_right_one_trains(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("0123456789abcdef0123456789abcdef\n")
    wrong.write_text("fedcba9876543210fedcba9876543210\n")
    with nodes(tmp_path, 2, ALL_REDUCE, CLUSTER_TOKEN_FILE=str(right)) as job:
        first = job.start(0, "10")
        stranger = job.start(1, "10", CLUSTER_TOKEN_FILE=str(wrong))
        assert stranger.end() == 7
        assert "CLUSTER_TOKEN_FILE differs from that of node 0" in stranger.said[-1]
        tokenless = job.start(1, "10", CLUSTER_TOKEN_FILE="")
        assert tokenless.end() == 7
        second = job.start(1, "10")
        assert ends([first, second]) == [0, 0]
    assert "its CLUSTER_TOKEN_FILE is not that of node 0" in first.text
    assert "without CLUSTER_TOKEN_FILE" not in first.text
