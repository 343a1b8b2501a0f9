"""The desk on real engines, over OpenSSH's own server in each node's network: every command when all is well."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import tarfile
import time

from tests.testbed import Cluster
from tests.testbed.desk import DeskBed, Host
from tests.testbed.stack import Stack

SHORT = "--steps 4 --layers 1 --width 32 --heads 2 --batch 8 --sample 0 --eval-every 0"
LONG = SHORT.replace("--steps 4", "--steps 100000")


def stack_of(host: Host) -> Stack:
    """The stack that the desk has started last on a host."""
    made = host.node.engine.client.containers.list(all=True, filters={"label": "com.docker.compose.service=trainer"})
    project = made[0].labels["com.docker.compose.project"]
    stack = Stack(engine=host.node.engine, folder=host.folder, project=project, exports={})
    if stack not in host.node.stacks:
        host.node.stacks.append(stack)
    return stack


def megabytes_of_files(output: str) -> float:
    found = re.search(r"files: ([\d.]+) MB sent", output)
    assert found, output
    return float(found[1])


def test_check_shows_every_host_in_a_row(desk2: DeskBed) -> None:
    done = desk2.run("check")
    assert done.code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.startswith("gpu-")]
    assert [row[0] for row in rows] == ["gpu-a", "gpu-b"]
    for host, row in zip(desk2.hosts, rows, strict=True):
        assert row[4] == host.node.engine.client.version()["Version"]
        image = host.node.engine.client.images.get("torchrun-compose:cpu").id
        assert row[-1] == str(image).removeprefix("sha256:")[:12]


def test_a_second_push_after_an_edit_sends_the_edit_alone_within_three_seconds(desk2: DeskBed) -> None:
    first = desk2.run("push")
    assert first.code == 0, first.output
    assert megabytes_of_files(first.output) > 0.1
    loop = desk2.project / "app/train/loop.py"
    took = []
    for edit in range(3):
        loop.write_text(f"{loop.read_text()}# edit {edit}\n")
        began = time.monotonic()
        done = desk2.run("push")
        took.append(time.monotonic() - began)
        assert done.code == 0, done.output
        assert megabytes_of_files(done.output) < 0.1
        assert [(host.folder / "app/train/loop.py").read_text() for host in desk2.hosts] == [loop.read_text()] * 2
    assert min(took) < 3, took
    # The user's there, not root's.
    assert {(host.folder / ".env").stat().st_uid for host in desk2.hosts} == {1000}


def test_up_trains_and_the_logs_of_all_ranks_are_one_stream(desk2: DeskBed) -> None:
    desk2.write_env({"NPROC_PER_NODE": "2", "TRAIN_ARGS": SHORT})
    done = desk2.run("up", "--attach")
    assert done.code == 0, done.output
    lines = done.output.splitlines()
    print(*(line for line in lines if line.startswith("torchrun-compose:")), sep="\n")
    roll_call = next(at for at, line in enumerate(lines) if "] all 2 nodes connected" in line)
    first_rank = next(at for at, line in enumerate(lines) if " rank " in line and line.startswith("[gpu-"))
    assert roll_call < first_rank
    assert {f"[{name} rank {rank}]" for name, rank in (("gpu-a", 0), ("gpu-a", 1), ("gpu-b", 2), ("gpu-b", 3))} <= {
        found[0] for line in lines if (found := re.match(r"\[gpu-\w rank \d\]", line))
    }
    logged = desk2.run("logs")
    assert "[all 2 nodes] done: all workers of 2 nodes ended well" in logged.output.splitlines()


def test_ctrl_c_detaches_and_stop_ends_all_nodes_after_a_checkpoint(desk2: DeskBed) -> None:
    desk2.write_env({"NPROC_PER_NODE": "1", "TRAIN_ARGS": LONG})
    attached = desk2.start("up", "--attach")
    assert attached.stdout
    seen: list[str] = []
    while not re.search(r"rank 0\] step \d", seen[-1] if seen else ""):
        line = attached.stdout.readline()
        assert line, "".join(seen)
        seen.append(line)
    os.killpg(attached.pid, signal.SIGINT)
    rest, _ = attached.communicate(timeout=20)
    assert attached.returncode == 0
    assert "detached; the job goes on" in rest
    assert [stack_of(host).running for host in desk2.hosts] == [True, True]
    again = desk2.run("up")
    assert again.code == 0
    assert "runs already" in again.output
    stopped = desk2.run("stop")
    assert stopped.code == 0, stopped.output
    assert [stack_of(host).wait(5) in (0, 143) for host in desk2.hosts] == [True, True]
    assert any(name.startswith("step-") for name in stack_of(desk2.hosts[0]).list("/runs/default/checkpoints"))
    restarted = desk2.run("restart")
    assert restarted.code == 0, restarted.output
    assert [stack_of(host).running for host in desk2.hosts] == [True, True]
    down = desk2.run("down")
    assert down.code == 0, down.output
    assert [host.node.engine.client.containers.list(all=True) for host in desk2.hosts] == [[], []]


COUNTS = "for number in range(100_000):\n    print('line', number)\n"


def test_ten_thousand_lines_a_second_are_shown(desk2: DeskBed) -> None:
    (desk2.project / "workspace/counts.py").write_text(COUNTS)
    desk2.write_env({"NPROC_PER_NODE": "1", "TRAIN_SCRIPT": "counts.py", "LOG_BYTES": "0"})
    assert desk2.run("up").code == 0
    assert [stack_of(host).wait(120) for host in desk2.hosts] == [0, 0]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    shown = desk2.run("logs", "--rank", "0,1").output.splitlines()
    after, took = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    numbers = [int(line.rpartition(" ")[2]) for line in shown if line.startswith("[gpu-a") or "gpu-a 0" in line]
    assert [number for number in numbers if number >= 0] == list(range(100_000))
    # Of the desk's processor: the engines of this testbed share it, and other tests too.
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"200000 lines in {took:.1f} s, {spent:.1f} s of the processor")
    assert 200_000 / spent > 10_000


FAILS = """
import os, torch.distributed as dist
dist.init_process_group("gloo")
if os.environ["RANK"] == "1":
    raise ValueError("the label of row 17 is missing")
dist.barrier()
"""


def test_what_went_wrong_is_one_archive_and_one_verdict(desk2: DeskBed) -> None:
    (desk2.project / "workspace/fails.py").write_text(FAILS)
    (desk2.project / "secrets/env").write_text("HF_TOKEN=hf_averysecrettoken\n")
    desk2.write_env({"NPROC_PER_NODE": "1", "TRAIN_SCRIPT": "fails.py", "MAX_RESTARTS": "0", "RESTART": "no"})
    done = desk2.run("up", "--attach")
    assert done.code == 5, done.output
    told = desk2.run("report", "--to", "r.tar.gz")
    assert told.code == 0, told.output
    verdicts = [line for line in told.output.splitlines() if line.startswith("verdict: ")]
    assert "gpu-b" in "".join(verdicts) or "node 1" in "".join(verdicts)
    assert "row 17" in told.output
    with tarfile.open(desk2.home / "r.tar.gz") as archive:
        content = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        texts = {name: file.read() for name, file in content.items() if file}
    assert {name.split("/")[0] for name in texts} == {"gpu-a", "gpu-b"}
    assert all(json.load(io.BytesIO(text)) for name, text in texts.items() if name.endswith("report.json"))
    assert not any(b"averysecret" in text for text in texts.values())


def test_all_nodes_answer_doctor_explain_and_run_and_give_their_results(desk2: DeskBed) -> None:
    desk2.write_env({"NPROC_PER_NODE": "1", "TRAIN_ARGS": SHORT})
    assert desk2.run("up", "--attach").code == 0
    explained = desk2.run("explain")
    assert explained.code == 0, explained.output
    rows = {line.split()[0]: line.split()[1:] for line in explained.output.splitlines() if line.strip()}
    assert rows["interface"] == [host.node.interface for host in desk2.hosts]
    assert "RUN_NAME" not in rows
    examined = desk2.run("doctor", env={"COLUMNS": "120"}, timeout=200)
    assert examined.code == 0, examined.output
    print(examined.output)
    assert examined.output.count("2 nodes, fit to train") == 1
    ran = desk2.run("run", "--", "sh", "-c", "echo here; exit 3")
    assert (ran.code, "[all 2 nodes] here" in ran.output) == (3, True), ran.output
    for _ in range(2):
        pulled = desk2.run("pull", "--to", "results")
        assert pulled.code == 0, pulled.output
    assert "0 files" in pulled.output
    here = desk2.home / "results/default/gpu-a"
    stack = stack_of(desk2.hosts[0])
    assert (here / "metrics.jsonl").read_bytes() == stack.read("/runs/default/metrics.jsonl")
    for name in stack.list("/runs/default/checkpoints"):
        assert (here / "checkpoints" / name).read_bytes() == stack.read(f"/runs/default/checkpoints/{name}")


def test_of_an_image_only_the_layers_that_a_host_lacks_are_sent(desk2: DeskBed, cluster2: Cluster) -> None:
    first, second = (node.engine.client for node in cluster2.nodes)
    container = first.containers.create("torchrun-compose:cpu", ["true"], entrypoint="sh")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        info = tarfile.TarInfo("grown")
        info.size = 3_000_000
        archive.addfile(info, io.BytesIO(os.urandom(info.size)))
    container.put_archive("/opt", content.getvalue())
    try:
        container.commit("local/grown", "1")
        desk2.write_env({"IMAGE": "local/grown:1"})
        done = desk2.run("push")
        assert done.code == 0, done.output
        sent = re.search(r"sending 1 of \d+ layers \(([\d.]+) MB\) to gpu-b", done.output)
        assert sent, done.output
        assert float(sent[1]) < 5
        same = [client.images.get("local/grown:1").attrs["RootFS"]["Layers"] for client in (first, second)]
        assert same[0] == same[1]
        assert "sent to 0 of 2 hosts" in desk2.run("push").output
    finally:
        container.remove()
        for client in (first, second):
            client.images.remove("local/grown:1")
