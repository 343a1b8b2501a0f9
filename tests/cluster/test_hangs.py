"""Two real nodes on which no rank moves any more: both say who did not come, and where it is instead."""

from __future__ import annotations

import time

from tests.cluster.bad_day import SCRIPTS, we_print
from tests.cluster.faults import all_hear, codes, heard, up, verdict
from tests.testbed import Cluster, Stack

PATIENCE = 4
STEP = r"rank \d has done step 4"


def hangs(bed: Cluster, scenario: str, script: str, arguments: str, **env: str) -> tuple[list[Stack], str]:
    """Two ranks on each node; the line that both nodes print, measured from the last step."""
    settings = {"NPROC_PER_NODE": "2", "TRAIN_ARGS": arguments, "HANG_REPORT": str(PATIENCE), **env}
    start = time.time()
    stacks = [up(node, bed.addresses, settings, script=(SCRIPTS / script).read_text()) for node in bed.nodes]
    since = min(heard(stack, STEP, start)[0] for stack in stacks) + start
    after, line = all_hear(stacks, "no progress on any rank for", since)
    assert {heard(stack, "no progress on any rank for", since)[1] for stack in stacks} == {line}
    we_print(scenario, after, verdict(line), by=f"HANG_REPORT={PATIENCE}")
    return stacks, line


def test_a_rank_that_sleeps_before_a_collective_is_named_and_the_job_lives_on(cluster2: Cluster) -> None:
    stacks, line = hangs(cluster2, "hang", "hang_before_collective.py", "2 15")
    assert "rank 2 has not reached all_reduce #6; ranks 0, 1, 3 are blocked in it at train.py:19, in train" in line
    assert f"rank 2 on node 1 ({cluster2.nodes[1].address}) is at train.py:25, in load_batch: time.sleep" in line
    assert codes(stacks) == [0, 0]


def test_ranks_in_different_collectives_are_named_and_hang_timeout_ends_the_round(cluster2: Cluster) -> None:
    env = {"HANG_TIMEOUT": "8", "MAX_RESTARTS": "0"}
    stacks, line = hangs(cluster2, "other collective", "other_collective.py", "1", **env)
    assert "ranks 0, 2, 3 all_reduce #6 at train.py:18" in line
    assert "rank 1 barrier #6 at train.py:24, in save_checkpoint: dist.barrier()" in line
    assert codes(stacks) == [5, 5]
    for stack in stacks:
        said = stack.compose("run", "--rm", "-T", "trainer", "report")
        assert "the job hangs: no progress on any rank for" in said
        assert "stacks of ranks that stood still: /runs/default/report/node" in said
