"""A healthy cluster says nothing that sounds like trouble, however often it is asked.

HEALTHY_RUNS=20 pytest tests/cluster/test_no_false_alarm.py
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

from tests.cluster.bad_day import SCRIPTS
from tests.cluster.faults import codes, up
from tests.testbed import Cluster, Node

RUNS = int(os.environ.get("HEALTHY_RUNS", "2"))
FLAGS = "--steps 12 --layers 1 --width 32 --heads 2 --context 32 --batch 8 --sample 0 --eval-every 0"
ALARM = re.compile(
    r"warn|FAIL|error|lost|slow:|waiting \d|cannot|no progress|kept for|report written|Traceback", re.IGNORECASE
)
EXPECTED = re.compile(r"without CLUSTER_TOKEN_FILE|, no errors$")
"""The one warning that these settings deserve, doctor's word for green."""


def test_healthy_runs_of_doctor_and_training_raise_no_alarm(cluster2: Cluster) -> None:
    env = {"NODES": cluster2.addresses, "NPROC_PER_NODE": "1", "TRAIN_ARGS": FLAGS}

    def examine(node: Node) -> tuple[int, str]:
        done = node.run("doctor", env=env)
        return done.code, done.output

    for number in range(RUNS):
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(examine, cluster2.nodes))
        stacks = [node.up({**env, "RUN_NAME": f"run{number}"}) for node in cluster2.nodes]
        found += [(stack.wait(120), stack.logs()) for stack in stacks]
        assert [code for code, _ in found] == [0] * 4, "\n".join(text for _, text in found)
        lines = [line for _, text in found for line in text.splitlines()]
        assert not [line for line in lines if "hostname of the client socket" in line], "no name server is here"
        assert not [line for line in lines if ALARM.search(line) and not EXPECTED.search(line)], f"run {number}"
        cluster2.clear()


WORK = (
    "process_pool",
    "grandchild",
    "thread_pool",
    "sleep_in_the_main_loop",
    "download",
    "download_by_a_program",
    "checkpoint_to_a_slow_disk",
    "stopped_and_continued",
)
"""Of tests/scripts/legal_work.py; tests/native/test_legal_work.py has all kinds."""


def test_eight_kinds_of_odd_but_legal_work_on_one_rank_while_the_other_waits_raise_no_alarm(cluster2: Cluster) -> None:
    kinds = f"{'+'.join(WORK)} {'+'.join(['idle_sleep'] * (len(WORK) - 1))}"
    env = {"TRAIN_ARGS": f"7 {kinds}", "HANG_REPORT": "3", "HANG_TIMEOUT": "5"}
    script = (SCRIPTS / "legal_work.py").read_text()
    stacks = [up(node, cluster2.addresses, env, script=script) for node in cluster2.nodes]
    assert codes(stacks, 180) == [0, 0], stacks[0].logs()
    lines = [line for stack in stacks for line in stack.logs().splitlines()]
    assert not [line for line in lines if ALARM.search(line) and not EXPECTED.search(line)]
