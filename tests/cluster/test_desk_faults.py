"""The desk when a host cannot be used, and when the desk goes in the middle: one sentence, and nothing half done."""

from __future__ import annotations

import concurrent.futures
import io
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.test_desk import LONG, stack_of
from tests.testbed import Cluster
from tests.testbed.desk import DeskBed, Host, desk_beside
from tests.testbed.shell import run

NAMED_WITHIN = 9.0
"""Seconds: 5 for the host, the rest for Python, ssh and a busy machine."""


def test_a_dead_host_is_named_in_seconds_and_does_not_hold_up_the_others(desk2: DeskBed) -> None:
    desk2.hosts[1].node.cut()
    began = time.monotonic()
    done = desk2.run("check")
    took = time.monotonic() - began
    assert done.code == 1
    assert "gpu-b does not answer" in done.output
    assert any(line.startswith("gpu-a") and "x86_64" in line for line in done.output.splitlines()), done.output
    assert took < NAMED_WITHIN
    began = time.monotonic()
    pushed = desk2.run("push")
    assert pushed.code == 1
    assert "gpu-b does not answer" in pushed.output
    assert (desk2.hosts[0].folder / ".env").exists()
    assert desk2.run("logs").code == 1


def test_a_host_that_dies_while_a_connection_is_open_is_named_too(desk2: DeskBed) -> None:
    assert desk2.run("check").code == 0
    desk2.hosts[1].node.cut()
    began = time.monotonic()
    done = desk2.run("stop")
    assert done.code == 1
    assert "gpu-b" in done.output
    assert time.monotonic() - began < 2 * NAMED_WITHIN


def refuse_key(host: Host) -> None:
    host.accept(None)


def change_host_key(host: Host) -> None:
    host.new_host_key()
    host.stop()
    host.start()


def stop_sshd(host: Host) -> None:
    host.stop()


def forbid_docker(host: Host) -> None:
    host.allow_docker(False)


def stop_engine(host: Host) -> None:
    host.node.stop_engine()


def lack_docker(host: Host) -> None:
    host.set_path(str(empty(host)))


def empty(host: Host) -> Path:
    """Programs of the machine but Docker's."""
    folder = host.home / "few"
    folder.mkdir(exist_ok=True)
    for name in ("sh", "date", "uname", "df", "tr", "cat", "id"):
        (folder / name).symlink_to(shutil.which(name) or name)
    return folder


def old_compose(host: Host) -> None:
    """FAKE: a docker whose Compose calls itself 2.20.2; no such package can be had for both Debian releases."""
    folder = empty(host)
    real = "/run/tools/usr/bin/docker" if host.node.engine.tools.prefix else shutil.which("docker")
    (folder / "docker").write_text(f'#!/bin/sh\n[ "$1" != compose ] || {{ echo 2.20.2; exit; }}\nexec {real} "$@"\n')
    (folder / "docker").chmod(0o755)
    host.set_path(str(folder))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (refuse_key, "gpu-b refuses the keys of this user. Run `ssh-copy-id gpu-b`"),
        (change_host_key, "gpu-b has another host key than before"),
        (stop_sshd, "gpu-b answers, but no ssh server listens there"),
        (forbid_docker, "This user may not use Docker on gpu-b. There: `sudo usermod -aG docker $USER`"),
        (lack_docker, "gpu-b has no Docker. There: `curl"),
        (old_compose, "Compose on gpu-b is 2.20.2"),
        (stop_engine, "Docker does not run on gpu-b. There: `sudo systemctl enable --now docker`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_with_a_host_is_one_sentence_with_its_fix(
    desk2: DeskBed, spoil: Callable[[Host], None], sentence: str
) -> None:
    spoil(desk2.hosts[1])
    done = desk2.run("check")
    assert done.code == 1, done.output
    problems = [line for line in done.output.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 1, done.output
    assert sentence in problems[0]


def test_a_host_whose_key_nobody_has_seen_is_named(desk2: DeskBed) -> None:
    (desk2.home / ".ssh/known_hosts").write_text("")
    done = desk2.run("check")
    assert done.code == 1
    assert done.output.count("host key is not known here yet") == 2


def test_a_full_disk_is_named_and_the_host_keeps_what_it_had(desk2: DeskBed) -> None:
    desk2.write_env({"HOST_DIR": str(desk2.hosts[1].home / "full/project")})
    done = desk2.run("--on", "gpu-b", "push")
    assert done.code == 1, done.output
    assert "gpu-b has no space left" in done.output


def test_an_image_for_another_kind_of_machine_is_refused(desk2: DeskBed) -> None:
    client = desk2.hosts[0].node.engine.client
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    archive_file = desk2.home / "arm.tar"
    archive_file.write_bytes(content.getvalue())
    engine = desk2.hosts[0].node.engine
    run(["docker", "import", "--platform", "linux/arm64", archive_file, "local/arm:1"], env=engine.environment)
    try:
        desk2.write_env({"IMAGE": "local/arm:1"})
        done = desk2.run("push")
        assert done.code == 1
        assert "gpu-b is amd64 and the image is arm64" in done.output
    finally:
        client.images.remove("local/arm:1")


def test_a_desk_that_is_killed_in_the_middle_of_a_push_leaves_the_old_one_whole(desk2: DeskBed) -> None:
    assert desk2.run("push").code == 0
    script, big = desk2.project / "workspace/script.py", desk2.project / "workspace/big.bin"
    script.write_text("old = 1\n")
    assert desk2.run("push").code == 0
    script.write_text("new = 22\n")
    big.write_bytes(os.urandom(40_000_000))
    for host in desk2.hosts:
        host.node.slow("40mbit")
    pushing = desk2.start("push")
    aside = [host.folder / ".desk" for host in desk2.hosts]
    end = time.monotonic() + 30
    while not all(any(folder.glob("new.*/files/workspace/big.bin")) for folder in aside):
        assert pushing.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(pushing.pid, signal.SIGKILL)
    pushing.wait(10)
    for host in desk2.hosts:
        host.node.restore()
        assert (host.folder / "workspace/script.py").read_text() == "old = 1\n"
        assert not (host.folder / "workspace/big.bin").exists()
    assert desk2.run("push").code == 0
    for host in desk2.hosts:
        assert (host.folder / "workspace/script.py").read_text() == "new = 22\n"
        assert (host.folder / "workspace/big.bin").read_bytes() == big.read_bytes()
        assert not list((host.folder / ".desk").glob("new.*"))


def test_two_desks_at_once_leave_the_files_of_one_of_them(desk2: DeskBed) -> None:
    other = shutil.copytree(desk2.project, desk2.home / "other")
    names = [f"workspace/part{number}.py" for number in range(40)]
    for folder, text in ((desk2.project, "one"), (other, "another")):
        for name in names:
            (folder / name).write_text(text)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        tasks = [pool.submit(desk2.run, "-C", str(folder), "push") for folder in (desk2.project, other)]
        done = [task.result() for task in tasks]
    assert [each.code for each in done] == [0, 0], done
    for host in desk2.hosts:
        assert len({(host.folder / name).read_text() for name in names}) == 1


def test_four_nodes_start_together_or_not_at_all(cluster4: Cluster) -> None:
    with desk_beside(cluster4) as desk:
        desk.write_env({"NPROC_PER_NODE": "1", "TRAIN_ARGS": LONG})
        desk.hosts[3].node.cut()
        refused = desk.run("up")
        assert refused.code == 1
        assert "gpu-d does not answer" in refused.output
        assert not any(host.node.engine.client.containers.list(all=True) for host in desk.hosts)
        desk.hosts[3].node.restore()
        # Nodes that joined the testbed later may have a younger build of the image.
        started = desk.run("up", "--image", "none")
        assert started.code == 0, started.output
        print(*(line for line in started.output.splitlines() if line.startswith("torchrun-compose:")), sep="\n")
        assert "] all 4 nodes connected" in started.output
        stopped = desk.run("stop")
        assert stopped.code == 0, stopped.output
        assert [stack_of(host).wait(5) in (0, 143) for host in desk.hosts] == [True] * 4


def test_a_desk_that_is_killed_in_the_middle_of_up_costs_the_job_nothing(desk2: DeskBed) -> None:
    desk2.write_env({"NPROC_PER_NODE": "1", "TRAIN_ARGS": LONG})
    starting = desk2.start("up")
    assert starting.stdout
    while "started on 2 hosts" not in (line := starting.stdout.readline()):
        assert line
    os.killpg(starting.pid, signal.SIGKILL)
    starting.wait(10)
    for host in desk2.hosts:
        stack_of(host).wait_for(r"all 2 nodes connected")
    again = desk2.run("up")
    assert (again.code, "runs already" in again.output) == (0, True), again.output
    assert desk2.run("down").code == 0
