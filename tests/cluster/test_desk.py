"""The desk on real engines, over OpenSSH's own server in each node's network: every command when all is well."""

from __future__ import annotations

import io
import json
import os
import re
import resource
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
