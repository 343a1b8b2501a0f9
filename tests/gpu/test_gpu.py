"""What must hold on any NVIDIA GPU: two nodes with real NCCL between them, on one card (conftest.py says how)."""

from __future__ import annotations

import json
import re
import signal

import pytest

from tests.gpu.conftest import GPU, Bed, until

TRAIN = "-m app.train --layers 2 --width 128 --heads 4 --context 64 --batch 16 --log-every 5 --eval-every 0 --sample 0"
# Twenty collectives that all ranks enter, then one fault.
HEAD = """
import datetime, os, sys, time, torch, torch.distributed as dist
gpu = torch.cuda.is_available()
device = torch.device("cuda" if gpu else "cpu")
limit = float(os.environ.get("LIMIT", "600"))
dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(seconds=limit))
rank, one = dist.get_rank(), torch.ones(1, device=device)
for step in range(20):
    dist.all_reduce(one)
    one.fill_(1)
one.item()
"""
HANGS = {
    "one rank sleeps where the other enters a collective": (
        "if rank == 1:\n    time.sleep(600)\ndist.all_reduce(one); one.item()",
        r"rank 1 has not reached all_reduce #21; rank 0 is blocked in it",
    ),
    "the ranks enter different collectives": (
        "dist.barrier() if rank == 1 else dist.all_reduce(one)\none.item(); time.sleep(600)",
        r"rank 0 all_reduce #21 .*rank 1 \w*barrier #21",
    ),
}
OF_GPUS = {
    "the same collective with other sizes": (
        "big = torch.ones(100 + 50 * rank, device=device)\nfor _ in range(5):\n    dist.all_reduce(big)\nbig[0].item()",
        r"different data|collective sizes",
    ),
    "one rank's kernel never ends": (
        "if rank == 1:\n    torch.cuda._sleep(10**13)\ndist.all_reduce(one); one.item()",
        r"no progress on any rank",
    ),
}
FAULTS = {
    "more GPU memory than there is": ("torch.empty(1 << 45, device=device)", r"rank 1 failed with .*out of memory"),
    "an index out of range on the GPU": (
        "torch.ones(1, device=device)[torch.tensor([7], device=device)].sum().item()",
        r"rank 1 failed with .*(device-side assert|index)",
    ),
    "a loss that is not a number": ("raise FloatingPointError('loss is nan')", r"rank 1 failed with FloatingPoint"),
    "an exception": ("raise ValueError('bad batch')", r"rank 1 failed with ValueError: bad batch"),
}
BOTH_NODES = {
    "both nodes on one GPU of one host": ({"NCCL_HOSTID": ""}, r"Two ranks use the same GPU|[Dd]uplicate GPU"),
    "an interface that is not there": ({"NCCL_SOCKET_IFNAME": "=nosuch0"}, r"rank \d failed with "),
}


def ended(bed: Bed, *codes: int, seconds: float = 120) -> str:
    """The last words of node 0, once all have ended with these codes."""
    assert [launcher.end(seconds) for launcher in bed.started] == list(codes)
    bed.found = bed.started[0].said[-1]
    return bed.found


def test_explain_plans_for_nccl_on_the_gpu(bed: Bed) -> None:
    launcher = bed.start(0, "explain", "--json")
    assert launcher.end() == 0
    env = json.loads(launcher.text[launcher.text.index("{\n") :])["plan"]["script"]["env"]
    assert env["BACKEND"] == ("nccl" if GPU else "gloo")
    bed.found = "BACKEND=" + env["BACKEND"]


def test_doctor_on_both_nodes_finds_nothing_that_stops_a_training(bed: Bed) -> None:
    launchers = bed.both("doctor")
    codes = [launcher.end(90) for launcher in launchers]
    bed.found = next((line for line in launchers[0].text.splitlines() if "NCCL" in line), "")
    assert codes == [0, 0]


def test_bench_gets_every_collective_right(bed: Bed) -> None:
    launchers = bed.both("bench", "--seconds", "8", "--smallest", "1K", "--largest", "1M")
    assert [launcher.end(120) for launcher in launchers] == [0, 0]
    assert "WRONG" not in launchers[0].text
    measures = json.loads((bed.folder / "node0/default/bench/result.json").read_text())["measures"]
    assert measures
    assert all(measure["correct"] for measure in measures)
    best = max(measures, key=lambda each: each.get("bus_gbps", 0))
    bed.found = f"{len(measures)} measures, all right; {best['collective']}"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("", id="ddp"),
        pytest.param("--sharding fsdp", id="fsdp2"),
        pytest.param("--compile true", id="compiled"),
    ],
)
def test_the_shipped_script_learns(bed: Bed, options: str) -> None:
    # Each rank of FSDP2 writes its part, into one folder.
    shared = {"CHECKPOINT_DIR": str(bed.folder / "shared"), "CHECKPOINTS": "own"} if "fsdp" in options else {}
    bed.both("run", *TRAIN.split(), *options.split(), "--steps", "30", **shared)
    ended(bed, 0, 0, seconds=180)
    losses = [float(loss) for loss in re.findall(r"step +\d+/30 .*?loss ([\d.]+)", bed.started[0].text)]
    assert losses[-1] < losses[0] - 0.3
    bed.found = f"loss {losses[0]} to {losses[-1]}"
    assert "slow: rank" not in bed.started[0].text, "two healthy ranks"


def test_a_killed_rank_is_named_and_the_training_goes_on_at_its_checkpoint(bed: Bed) -> None:
    launchers = bed.both("run", *TRAIN.split(), "--steps", "100000", "--checkpoint-every", "5")
    mark = bed.folder / "node0/default/checkpoints"
    until(lambda: any(mark.glob("step-*/.metadata")), 120, "a checkpoint")
    (worker,) = [each for each in launchers[1].workers() if "app.train" in " ".join(each.cmdline())][-1:]
    worker.send_signal(signal.SIGKILL)
    told = launchers[0].wait_for(r"rank 1 was ended by SIGKILL[^\n]*", 60)[0]
    launchers[0].wait_for(r"resumed? .*step", 120)
    bed.started[1].signal(signal.SIGTERM)
    ended(bed, 143, 143)
    bed.found = told


def test_a_stop_writes_a_checkpoint_and_ends_all(bed: Bed) -> None:
    launchers = bed.both("run", *TRAIN.split(), "--steps", "100000", "--checkpoint-every", "1000000")
    launchers[0].wait_for(r"step +\d+/100000", 120)
    launchers[1].signal(signal.SIGTERM)
    ended(bed, 143, 143)
    assert any((bed.folder / "node0/default/checkpoints").glob("step-*/.metadata"))


@pytest.mark.parametrize("name", [*HANGS, *(pytest.param(name, marks=pytest.mark.needs_gpu) for name in OF_GPUS)])
def test_a_hang_is_named_by_both_nodes(bed: Bed, name: str) -> None:
    body, pattern = {**HANGS, **OF_GPUS}[name]
    for launcher in bed.script(HEAD + body, HANG_REPORT="3", MAX_RESTARTS="0", STOP_GRACE="1"):
        # NCCL notices other sizes by itself at times, and the job ends.
        bed.found = launcher.wait_for(rf"[^\n]*({pattern})[^\n]*", 60)[0]
    for launcher in bed.started:
        launcher.signal(signal.SIGTERM)
    for launcher in bed.started:
        launcher.end(60)


def test_torchs_own_time_out_is_told_with_the_rank_that_did_not_come(bed: Bed) -> None:
    body = "if rank == 1:\n    time.sleep(600)\ndist.all_reduce(one); one.item()"
    bed.script(HEAD + body, LIMIT="8", HANG_REPORT="3", MAX_RESTARTS="0")
    assert "rank 1 has not reached all_reduce #21" in ended(bed, 5, 5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs_gpu if "GPU" in name else ()) for name in FAULTS]
)
def test_a_fault_of_one_rank_is_named_by_both_nodes(bed: Bed, name: str) -> None:
    body, pattern = FAULTS[name]
    bed.script(f"{HEAD}if rank == 1:\n    {body}\ndist.all_reduce(one); one.item()", MAX_RESTARTS="0")
    assert re.search(pattern, ended(bed, 5, 5))


@pytest.mark.needs_gpu
@pytest.mark.parametrize("name", BOTH_NODES)
def test_a_set_up_that_nccl_refuses_is_told(bed: Bed, name: str) -> None:
    settings, pattern = BOTH_NODES[name]
    bed.script(HEAD, MAX_RESTARTS="0", **settings)
    ended(bed, 5, 5)
    assert re.search(pattern, "".join(launcher.text for launcher in bed.started))
