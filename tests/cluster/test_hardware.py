"""What each kind of machine asks of the engine, and that the request reaches the container.

No GPU and no InfiniBand card is here: the runtime hook, the CDI specification and the device nodes are fakes, and
nothing below says that training runs on such hardware.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_testbed import connect
from tests.testbed import BedError, Cluster, Node
from tests.testbed.node import fake_gpu_hook
from tests.testbed.shell import PROJECT, until

# The nodes have one image; on real machines each kind builds its own.
IMAGE = {"IMAGE": "torchrun-compose:cpu"}
GPU_REQUEST = {"Driver": "nvidia", "Count": -1, "DeviceIDs": None, "Capabilities": [["gpu"]], "Options": None}
CDI_REQUEST = {"Driver": "cdi", "Count": 0, "DeviceIDs": ["nvidia.com/gpu=all"], "Capabilities": [["gpu"]]}
MEMLOCK = {"Name": "memlock", "Hard": -1, "Soft": -1}
INFINIBAND = {"PathOnHost": "/dev/infiniband", "PathInContainer": "/dev/infiniband", "CgroupPermissions": "rwm"}
PYTHON = ("--entrypoint", "python")
# The shipped limit cannot be set where the machine itself is limited, as most virtual machines for tests are.
NO_MEMLOCK = "ulimits: !reset null"


def created(node: Node, hardware: str, **env: str) -> dict[str, Any]:
    attributes = node.create({**IMAGE, "HARDWARE": hardware, **env}).attributes
    return {**attributes["HostConfig"], "Config": attributes["Config"], "Mounts": attributes["Mounts"]}


@pytest.mark.parametrize(
    ("hardware", "requests", "devices", "ulimits"),
    [
        ("cpu", [], [], []),
        ("nvidia", [GPU_REQUEST], [], []),
        ("nvidia-ib", [GPU_REQUEST], [INFINIBAND], [MEMLOCK]),
        ("cdi", [CDI_REQUEST], [], []),
    ],
)
def test_each_kind_of_machine_asks_for_its_devices_and_nothing_more(
    cluster2: Cluster,
    hardware: str,
    requests: list[dict[str, Any]],
    devices: list[dict[str, str]],
    ulimits: list[dict[str, Any]],
) -> None:
    host = created(cluster2.nodes[0], hardware)
    asked = host["DeviceRequests"] or []
    assert [{key: request[key] for key in wanted} for request, wanted in zip(asked, requests, strict=True)] == requests
    assert (host["Devices"] or []) == devices
    assert [limit for limit in host["Ulimits"] or [] if limit["Name"] == "memlock"] == ulimits
    assert not host["CapAdd"]


@pytest.mark.parametrize("hardware", sorted({file.stem for file in (PROJECT / "hardware").glob("*.yaml")} - {"shell"}))
def test_every_kind_of_machine_is_equally_hardened(cluster2: Cluster, hardware: str) -> None:
    host = created(cluster2.nodes[0], hardware)
    assert host["NetworkMode"] == "host"
    assert host["IpcMode"] == "private"
    assert host["PidMode"] == ""
    assert host["Privileged"] is False
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["ReadonlyRootfs"] is True
    assert list(host["Tmpfs"]) == ["/tmp"]
    assert host["Init"] is True
    assert host["PidsLimit"] == 32768
    assert host["ShmSize"] == 8 * 2**30
    assert host["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 5}
    assert host["LogConfig"]["Type"] == "local"
    assert host["Config"]["User"] == "1000:1000"
    assert host["Config"]["StopTimeout"] == 60
    assert {mount["Destination"] for mount in host["Mounts"] if mount["RW"]} == {"/runs", "/workspace"}


def test_the_workspace_is_read_only_by_a_word_and_the_user_is_the_named_one(cluster2: Cluster) -> None:
    host = created(cluster2.nodes[0], "cpu", WORKSPACE_READ_ONLY="true", RUN_AS="1234:1235")
    assert [mount["Destination"] for mount in host["Mounts"] if mount["RW"]] == ["/runs"]
    assert host["Config"]["User"] == "1234:1235"


def test_what_compose_alone_reads_can_be_set(cluster2: Cluster, tmp_path: Path) -> None:
    shared = tmp_path / "runs"
    shared.mkdir()
    env = {"SHM_SIZE": "2gb", "RESTART": "no", "STOP_GRACE_PERIOD": "5s", "RUNS": str(shared)}
    host = created(cluster2.nodes[0], "cpu", **env)
    assert host["ShmSize"] == 2 * 2**30
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["Config"]["StopTimeout"] == 5
    assert {"/runs": str(shared)}.items() <= {mount["Destination"]: mount["Source"] for mount in host["Mounts"]}.items()


def test_the_container_really_has_no_privileges(cluster2: Cluster) -> None:
    script = "print(open('/proc/self/status').read()); open('/opt/torchrun-compose/x', 'w')"
    said = cluster2.nodes[0].run("-c", script, options=PYTHON).output
    status = dict(line.split(":\t", 1) for line in said.splitlines() if ":\t" in line)
    assert status["Uid"].split() == ["1000"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert "Read-only file system" in said


def test_a_gpu_request_reaches_the_vendors_hook_and_the_containers_environment(cluster2: Cluster) -> None:
    node = cluster2.nodes[0]
    with fake_gpu_hook(node, '#!/bin/sh\ncat > "$0.state"; echo "$1" > "$0.stage"\n') as folder:
        script = "import os; print(os.environ['NVIDIA_VISIBLE_DEVICES'], os.environ['NVIDIA_DRIVER_CAPABILITIES'])"
        done = node.run("-c", script, env={**IMAGE, "HARDWARE": "nvidia"}, options=PYTHON)
        assert "all compute,utility" in done.output
        assert (folder / "nvidia-container-runtime-hook.stage").read_text().strip() == "prestart"
        state = json.loads((folder / "nvidia-container-runtime-hook.state").read_text())
    assert state["pid"] > 0


def test_a_gpu_request_fails_with_the_hooks_words_when_the_driver_is_not_loaded(cluster2: Cluster) -> None:
    node = cluster2.nodes[0]
    script = "#!/bin/sh\necho 'nvidia-container-cli: initialization error: nvml error: driver not loaded' >&2\nexit 1\n"
    with fake_gpu_hook(node, script):
        done = node.run("explain", env={**IMAGE, "HARDWARE": "nvidia"})
    assert done.code != 0
    assert "nvml error: driver not loaded" in done.output


def test_a_machine_without_the_gpu_toolkit_is_told_which_driver_is_missing(cluster2: Cluster) -> None:
    done = cluster2.nodes[0].run("explain", env={**IMAGE, "HARDWARE": "nvidia"})
    assert done.code != 0
    assert 'could not select device driver "nvidia"' in done.output


def test_a_cdi_specification_brings_its_device_nodes_into_the_container(cluster2: Cluster) -> None:
    node = cluster2.nodes[0]
    nodes = [
        {"path": f"/dev/{name}", "hostPath": "/dev/null", "permissions": "rw"} for name in ("nvidia0", "nvidiactl")
    ]
    device = {"name": "all", "containerEdits": {"deviceNodes": nodes}}
    spec = node.engine.home / "cdi" / "nvidia.json"
    spec.write_text(json.dumps({"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": [device]}))
    try:
        script = "import os; print([open(f'/dev/{n}', 'wb').write(b'x') for n in ('nvidia0', 'nvidiactl')])"
        done = node.run("-c", script, env={**IMAGE, "HARDWARE": "cdi"}, options=PYTHON)
    finally:
        spec.unlink()
    assert done.code == 0
    assert "[1, 1]" in done.output


def test_infiniband_device_nodes_can_be_opened_by_the_images_user(cluster2: Cluster) -> None:
    node = cluster2.nodes[0]
    cards = node.engine.home / "infiniband"
    cards.mkdir()
    for name in ("uverbs0", "rdma_cm"):
        # FAKE: the null device's numbers under the names of InfiniBand's.
        os.mknod(cards / name, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (cards / name).chmod(0o666)
    override = f"services: {{trainer: {{devices: !override ['{cards}:/dev/infiniband'], {NO_MEMLOCK}}}}}\n"
    with fake_gpu_hook(node, "#!/bin/sh\ncat > /dev/null\n"):
        script = "print(*(open(f'/dev/infiniband/{n}', 'wb').write(b'x') for n in ('uverbs0', 'rdma_cm')))"
        done = node.run(
            "-c",
            script,
            env={**IMAGE, "HARDWARE": "nvidia-ib"},
            files={"compose.override.yaml": override},
            options=PYTHON,
        )
    assert done.code == 0, done.output
    assert "1 1" in done.output


def test_an_unknown_kind_of_machine_is_refused_by_name(cluster2: Cluster) -> None:
    with pytest.raises(BedError, match=r"hardware/nvida\.yaml: no such file or directory"):
        cluster2.nodes[0].create({**IMAGE, "HARDWARE": "nvida"})


def test_a_secret_reaches_the_container_as_a_file_and_never_as_a_value(cluster2: Cluster) -> None:
    node = cluster2.nodes[0]
    script = "import os; path = os.environ['CLUSTER_TOKEN_FILE']; print(path, open(path).read())"
    env = {"CLUSTER_TOKEN_FILE": "./secrets/token"}
    done = node.run("-c", script, env=env, files={"secrets/token": "s3cret\n"}, options=PYTHON)
    assert "/run/secrets/cluster_token s3cret" in done.output
    node.create(env, files={"secrets/token": "s3cret\n"})
    assert "s3cret" not in json.dumps(node.stacks[-1].attributes)


def test_a_path_that_is_not_there_is_an_error_and_not_a_new_folder_of_roots(cluster2: Cluster) -> None:
    node = cluster2.nodes[0]
    for name in ("CLUSTER_TOKEN_FILE", "WORKSPACE", "DATA_DIR"):
        with pytest.raises(BedError, match=r"bind source path does not exist: .*/none"):
            node.create({name: "./none"})
        assert not (node.stacks[-1].folder / "none").exists()


def test_without_a_secret_the_container_is_told_of_none(cluster2: Cluster) -> None:
    script = "import os; print(repr(os.environ.get('CLUSTER_TOKEN_FILE')))"
    assert "''" in cluster2.nodes[0].run("-c", script, options=PYTHON).output


def test_tensorboard_shows_the_runs_to_this_machine_only(cluster2: Cluster) -> None:
    first, second = cluster2.nodes
    stack = first.stack()
    stack.compose("--profile", "tensorboard", "up", "--detach", "--no-build", "tensorboard")
    until(lambda: connect(first, "127.0.0.1", 6006) == "open", deadline=60, what="tensorboard", every=0.5)
    assert connect(second, first.address, 6006) == "refused"
    page = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:6006/data/environment').read().decode())"
    assert "/runs" in first.shell("python3", "-c", page)
