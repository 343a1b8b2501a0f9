"""Reports of jobs that fail on real engines, printed by a container that did not run the job."""

from __future__ import annotations

from tests.cluster.bad_day import SCRIPTS, fault_at, we_print
from tests.cluster.faults import all_hear, verdict
from tests.testbed import Cluster

# Docker's own limit; without swap, so that it is reached in seconds.
LIMIT = "services: {trainer: {mem_limit: 700m, memswap_limit: 700m}}\n"


def test_a_worker_killed_for_memory_is_reported_as_such_on_its_node(cluster2: Cluster) -> None:
    settings = {
        "NODES": cluster2.addresses,
        "NPROC_PER_NODE": "1",
        "MAX_RESTARTS": "0",
        "TRAIN_SCRIPT": "/workspace/hungry.py",
        "TRAIN_ARGS": "memory 1",
    }
    files = {"workspace/hungry.py": (SCRIPTS / "goes_wrong.py").read_text(), "compose.override.yaml": LIMIT}
    stacks = [node.up(settings, files=files) for node in cluster2.nodes]
    after, line = all_hear(stacks, r"node 1 \(.*rank 1 was ended by SIGKILL", fault_at(stacks))
    we_print("memory", after, verdict(line))
    assert [stack.wait(90) for stack in stacks] == [5, 5]
    told = [stack.compose("run", "--rm", "-T", "trainer", "report") for stack in stacks]
    for text in told:
        assert len(text.strip().splitlines()) <= 15
        assert "rank 1 was ended by SIGKILL (the kernel killed it: out of memory)" in text
    assert "kills for memory +1" in told[1]
    assert "first error here: rank 1 was ended by SIGKILL" in told[1]
    assert "known as: oom-kernel" in told[1]
    assert "kills for memory" not in told[0]
