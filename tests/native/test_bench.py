"""The bench with real ranks on this machine: every collective gives the right result, pairs of nodes are measured.

Unit tests cover what is concluded from figures; only real ranks show that a collective is called as gloo wants it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.native.ports import free_port

PROJECT = Path(__file__).resolve().parents[2]
COLLECTIVES = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv"]
TINY = ("--seconds", "6", "--smallest", "1K", "--largest", "16K")


def environment(run_dir: Path, **extra: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "NCCL_", "GLOO_"))}
    return {
        **inherited,
        "PYTHONPATH": str(PROJECT),
        "RUN_DIR": str(run_dir),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


def result(run_dir: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run_dir / "bench" / "result.json").read_text())
    return found


def test_under_torchrun_every_collective_of_two_ranks_is_right_and_the_second_run_is_compared(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    for told in ("Kept as the baseline for later runs", "Against the baseline"):
        command = [*torchrun, f"--master-port={free_port()}", "-m", "app.bench", *TINY]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert told in done.stdout
        assert "One node: nothing was sent over the network." in done.stdout
        assert "WRONG" not in done.stdout
    measures = result(tmp_path)["measures"]
    assert isinstance(measures, list)
    assert list(dict.fromkeys(measure["collective"] for measure in measures)) == COLLECTIVES
    assert all(measure["correct"] and measure["seconds"] > 0 for measure in measures)


def start_nodes(
    nodes: int, run_dir: Path, *arguments: str, programs: Mapping[int, tuple[str, ...]] | None = None
) -> list[subprocess.Popen[str]]:
    """One rank per node, each with the variables that torchrun would set on that node."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *(programs or {}).get(node, ("-m", "app.bench")), *arguments],
            cwd=run_dir,
            env=environment(
                run_dir,
                RANK=str(node),
                WORLD_SIZE=str(nodes),
                LOCAL_RANK="0",
                LOCAL_WORLD_SIZE="1",
                GROUP_RANK=str(node),
                GROUP_WORLD_SIZE=str(nodes),
                NODES=",".join(f"127.0.0.{number + 1}" for number in range(nodes)),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(nodes)
    ]


def test_three_nodes_measure_every_direction_between_them(tmp_path: Path) -> None:
    ranks = start_nodes(3, tmp_path, *TINY)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
    assert "bench: 3 ranks on 3 nodes, gloo on cpu" in outputs[0]
    assert "bench:" not in outputs[1] + outputs[2]
    found = result(tmp_path)
    assert found["nodes"] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    pairs, measures = found["pairs"], found["measures"]
    assert isinstance(pairs, list)
    assert isinstance(measures, list)
    edges = [(pair["source"], pair["target"]) for pair in pairs]
    assert edges == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert all(pair["bandwidth"] > 0 and pair["latency"] > 0 for pair in pairs)
    assert list(dict.fromkeys(measure["collective"] for measure in measures)) == COLLECTIVES
    assert all(measure["correct"] for measure in measures)


CORRUPTING = """
import runpy
import torch
import torch.distributed as dist

honest = dist.all_reduce

def corrupting(tensor, *arguments):
    honest(tensor, *arguments)
    if tensor.dtype == torch.float32:
        tensor[-1] += 1

dist.all_reduce = corrupting
runpy.run_module("app.bench", run_name="__main__")
"""


def test_a_result_that_is_wrong_on_one_rank_is_told_and_fails_the_bench_on_all(tmp_path: Path) -> None:
    # Stands for hardware that corrupts data, which this machine does not have.
    (tmp_path / "corrupting.py").write_text(CORRUPTING)
    arguments = ("--seconds", "3", "--largest", "1K")
    ranks = start_nodes(2, tmp_path, *arguments, programs={1: ("corrupting.py",)})
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], outputs
    assert "WRONG RESULTS: all_reduce. Do not train on this cluster" in outputs[0]
    assert "not kept as a baseline" in outputs[0]


OLDER_TORCH = """
import runpy
import torch.distributed as dist

for name in ("all_gather_single", "reduce_scatter_single"):
    if hasattr(dist, name):
        delattr(dist, name)
runpy.run_module("app.bench", run_name="__main__")
"""


def test_a_torch_without_the_names_of_2_13_measures_the_same_collectives(tmp_path: Path) -> None:
    (tmp_path / "older.py").write_text(OLDER_TORCH)
    programs = dict.fromkeys(range(2), ("older.py",))
    ranks = start_nodes(2, tmp_path, "--seconds", "3", "--largest", "1K", programs=programs)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    measures = result(tmp_path)["measures"]
    assert isinstance(measures, list)
    assert [(one["collective"], one["correct"]) for one in measures] == [(name, True) for name in COLLECTIVES]


def test_a_check_leaves_the_same_figures_on_every_node_wrong_ones_too(tmp_path: Path) -> None:
    (tmp_path / "corrupting.py").write_text(CORRUPTING)
    programs = {0: ("-m", "app.bench", "--check=node0.json"), 1: ("corrupting.py", "--check=node1.json")}
    started = start_nodes(2, tmp_path, programs=programs)
    outputs = [rank.communicate(timeout=120)[0] for rank in started]
    assert [rank.returncode for rank in started] == [0, 0], outputs
    found, other = (json.loads((tmp_path / f"node{node}.json").read_text()) for node in range(2))
    assert found["measures"] == other["measures"]
    assert {one["collective"] for one in found["measures"]} == {"all_reduce"}
    assert not any(one["correct"] for one in found["measures"])
    assert {(pair["source"], pair["target"]) for pair in found["pairs"]} == {(0, 1), (1, 0)}


@pytest.mark.parametrize("nodes", [*range(2, 13)])
def test_the_schedule_meets_every_pair_once_and_no_node_twice_in_a_step(nodes: int) -> None:
    from app.bench.pairs import rounds, schedule

    steps = schedule(nodes)
    assert sorted(pair for step in steps for pair in step) == [
        (low, high) for low in range(nodes) for high in range(low + 1, nodes)
    ]
    for step in steps:
        members = [node for pair in step for node in pair]
        assert len(members) == len(set(members))
    assert len(steps) <= (nodes if nodes > 8 else nodes * nodes)
    assert len(rounds(nodes)) == nodes - 1 + nodes % 2
    assert sorted(pair for step in rounds(nodes) for pair in step) == sorted(pair for step in steps for pair in step)
