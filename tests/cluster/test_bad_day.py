"""Bad days on real engines, each ending in a sentence with the node, the value and the way out.

The other days of the table have their tests where their faults are made: doctor, the roll call, reports, hangs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

from tests.cluster.bad_day import FULL, SCRIPTS, another_image, fault_at, we_print
from tests.cluster.faults import all_hear, codes, heard, up, verdict
from tests.testbed import Cluster, Stack

SCRIPT = (SCRIPTS / "goes_wrong.py").read_text()
HELPER = {"workspace/preprocessing.py": "def ready(): pass\n"}
SMALL = "--layers 1 --width 32 --heads 2 --sample 0 --eval-every 0"


def two_nodes(
    bed: Cluster, arguments: str, *, each: Mapping[int, Mapping[str, str]] | None = None, **env: str
) -> list[Stack]:
    """goes_wrong.py on two nodes of two ranks, no restarts; `each` are further files of a node's checkout."""
    settings = {"NPROC_PER_NODE": "2", "MAX_RESTARTS": "0", "TRAIN_ARGS": arguments, **env}
    files = each or {}
    return [up(node, bed.addresses, settings, script=SCRIPT, files=files.get(node.index)) for node in bed.nodes]


def all_print(scenario: str, stacks: Sequence[Stack], pattern: str, since: float) -> str:
    """All nodes print one and the same line with `pattern`, which goes into the table."""
    after, line = all_hear(stacks, pattern, since, 60)
    said = re.compile(r"\[rank \d+\] ")
    assert len({said.sub("", heard(stack, pattern, since)[1]) for stack in stacks}) == 1
    we_print(scenario, after, said.sub("", verdict(line)))
    return line


def test_an_exception_on_one_rank_of_four_is_named_on_both_nodes(cluster2: Cluster) -> None:
    stacks = two_nodes(cluster2, "exception 3")
    culprit = rf"node 1 \({cluster2.nodes[1].address}\) - rank 3 failed with ValueError: bad batch"
    all_print("exception", stacks, culprit, fault_at(stacks))
    assert codes(stacks) == [5, 5]


def test_a_full_disk_is_named_with_its_node_and_known_by_its_text(cluster2: Cluster) -> None:
    # This disk is gone with its container, and with it what keeps Docker from starting the container again.
    stacks = two_nodes(cluster2, "disk 2", each={1: {"compose.override.yaml": FULL}}, RESTART="no")
    all_print("disk", stacks, r"node 1 \(.*rank 2 failed with", fault_at(stacks))
    assert codes(stacks) == [5, 5]


def test_an_import_that_fails_on_one_node_is_named_on_both(cluster2: Cluster) -> None:
    since = time.time()
    stacks = two_nodes(cluster2, "import", each={0: HELPER})
    all_print("import", stacks, r"node 1 \(.*rank [23] failed with ModuleNotFoundError: No module named 'prepr", since)
    assert codes(stacks) == [5, 5]


def test_a_script_that_one_node_lacks_is_named_there_and_the_other_says_for_whom_it_waits(cluster2: Cluster) -> None:
    first, second = cluster2.nodes
    settings = {"NODES": cluster2.addresses, "TRAIN_SCRIPT": "/workspace/train.py", "START_TIMEOUT": "10"}
    since = time.time()
    stacks = [up(first, cluster2.addresses, {"START_TIMEOUT": "10"}, script=SCRIPT), second.up(settings)]
    after, line = heard(stacks[1], r"TRAIN_SCRIPT=/workspace/train.py \(.env:3\): there is no such file", since)
    we_print("no script", after, verdict(line))
    heard(stacks[0], rf"waiting .* for node 1 \({second.address}\)", since)
    assert codes(stacks) == [3, 2]


def test_another_image_on_one_node_is_told_with_the_package_and_the_cure(cluster2: Cluster) -> None:
    first, second = cluster2.nodes
    with another_image(second) as name:
        since = time.time()
        stacks = [
            up(node, cluster2.addresses, image, script="print('runs')", files={})
            for node, image in ((first, {}), (second, {"IMAGE": name}))
        ]
        all_print("image", stacks, r"package einops +- \(node 0\) +0\.8\.1 \(node 1\)", since)
        assert codes(stacks) == [0, 0]
        for stack in stacks:
            said = stack.logs()
            assert "warning: the nodes differ, which may be intended" in said
            assert "Use the same image on all nodes" in said
            assert "torchrun-compose  " in said


def test_fsdp_without_a_shared_folder_is_refused_with_the_ranks_and_the_way_out(cluster2: Cluster) -> None:
    since = time.time()
    train = {"TRAIN_SCRIPT": "-m app.train", "TRAIN_ARGS": f"--sharding fsdp --steps 4 {SMALL}"}
    stacks = [up(node, cluster2.addresses, train) for node in cluster2.nodes]
    all_print("not shared", stacks, r"sharding=fsdp needs a CHECKPOINT_DIR that all ranks share", since)


def test_one_slow_rank_is_named_by_the_shipped_script(cluster2: Cluster) -> None:
    since = time.time()
    # Steps long enough for the limit to be felt within each: the kernel grants it in slices of 0.1 s.
    heavy = "--steps 45 --log-every 5 --layers 2 --width 128 --heads 2 --sample 0 --eval-every 0"
    train = {"TRAIN_SCRIPT": "-m app.train", "TRAIN_ARGS": heavy}
    few = {1: {"compose.override.yaml": "services: {trainer: {cpus: 0.15}}\n"}}
    stacks = [up(node, cluster2.addresses, train, files=few.get(node.index)) for node in cluster2.nodes]
    after, line = heard(stacks[0], r"slow: rank 1 on node 1 .* times the median rank's time", since, 120)
    we_print("slow rank", after, line)
    assert "slow: rank 0" not in stacks[0].logs()
