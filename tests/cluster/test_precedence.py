"""The shell's value beats that of .env, and .env beats the default: in the container and without Docker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.config.settings import TABLE
from tests.testbed import Cluster, Node
from tests.testbed.shell import PROJECT

IN_FILE = {
    "NODES": "127.0.0.1,127.0.0.2",
    "NODE_RANK": "0",
    "NNODES": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "CONTROL_PORT": "29510",
    "NPROC_PER_NODE": "2",
    "RUN_NAME": "of-file",
    "HARDWARE": "nvidia-ib",
    "BACKEND": "auto",
    "TRAIN_SCRIPT": "-m app.train",
    "TRAIN_ARGS": "--steps 3 --seed '1'",
    "RUNS_ROOT": "/runs/file",
    "RUN_DIR": "/runs/file/x",
    "CHECKPOINT_DIR": "/runs/file/y",
    "CHECKPOINTS": "own",
    "MIRROR_KEEP": "3",
    "MIRROR_LIMIT": "1GB",
    "PRELOAD": "torch,numpy",
    "DATA": "/usr/share/file",
    "START_TIMEOUT": "101",
    "MIN_NODES": "1",
    "SPARES": "0",
    "REGROW": "failure",
    "MAX_RESTARTS": "7",
    "REJOIN_TIMEOUT": "102",
    "STOP_GRACE": "21",
    "HEARTBEAT_TIMEOUT": "11",
    "HANG_REPORT": "61",
    "HANG_TIMEOUT": "601",
    "LOG_BYTES": "1000",
    "CLUSTER_TOKEN_FILE": "./secrets/file",
    "STOPPED_EXIT_CODE": "3",
    "NCCL_SOCKET_IFNAME": "=file0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_IB_HCA": "=mlx5_0:1",
    "NCCL_DEBUG": "INFO",
    "NCCL_RAS_ADDR": "localhost:29600",
    "GLOO_IB_DISABLE": "1",
    "OMP_NUM_THREADS": "3",
    "CUDA_LAUNCH_BLOCKING": "1",
    "PYTHONUNBUFFERED": "2",
    "TORCH_FR_DUMP_TEMP_FILE": "/tmp/file_",
    "METRICS_PORT": "9400",
    "NOTIFY": "json://127.0.0.1/file",
}
IN_SHELL = {
    "NODES": "127.0.0.3,127.0.0.4,127.0.0.5",
    "NODE_RANK": "1",
    "NNODES": "3",
    "MASTER_ADDR": "127.0.0.3",
    "MASTER_PORT": "29501",
    "CONTROL_PORT": "29511",
    "NPROC_PER_NODE": "1",
    "RUN_NAME": "of-shell",
    "HARDWARE": "nvidia",
    "BACKEND": "gloo",
    "TRAIN_SCRIPT": "-m app.train.__main__",
    "TRAIN_ARGS": "--steps 4",
    "RUNS_ROOT": "/runs/shell",
    "RUN_DIR": "/runs/shell/x",
    "CHECKPOINT_DIR": "/runs/shell/y",
    "CHECKPOINTS": "mirror",
    "MIRROR_KEEP": "4",
    "MIRROR_LIMIT": "2GB",
    "PRELOAD": "numpy",
    "DATA": "/usr/share/shell",
    "START_TIMEOUT": "103",
    "MIN_NODES": "2",
    "SPARES": "1",
    "REGROW": "checkpoint",
    "MAX_RESTARTS": "8",
    "REJOIN_TIMEOUT": "104",
    "STOP_GRACE": "22",
    "HEARTBEAT_TIMEOUT": "12",
    "HANG_REPORT": "62",
    "HANG_TIMEOUT": "602",
    "LOG_BYTES": "2000",
    "CLUSTER_TOKEN_FILE": "./secrets/shell",
    "STOPPED_EXIT_CODE": "4",
    "NCCL_SOCKET_IFNAME": "=shell0",
    "GLOO_SOCKET_IFNAME": "shell0",
    "NCCL_IB_DISABLE": "0",
    "NCCL_IB_HCA": "=mlx5_1:1",
    "NCCL_DEBUG": "TRACE",
    "NCCL_RAS_ADDR": "localhost:29601",
    "GLOO_IB_DISABLE": "0",
    "OMP_NUM_THREADS": "4",
    "CUDA_LAUNCH_BLOCKING": "0",
    "PYTHONUNBUFFERED": "3",
    "TORCH_FR_DUMP_TEMP_FILE": "/tmp/shell_",
    "METRICS_PORT": "9401",
    "NOTIFY": "json://127.0.0.1/shell",
}
# What compose.yaml gives a container that nothing else is said to.
COMPOSE_DEFAULTS = {"RUNS_ROOT": "/runs", "STOPPED_EXIT_CODE": "0", "PYTHONUNBUFFERED": "1", "CLUSTER_TOKEN_FILE": ""}
FOR_COMPOSE = {
    "ENV_FILE": ("./a.env", "./b.env"),
    "IMAGE": ("local/a:1", "local/b:1"),
    "BASE_IMAGE": ("debian:12", "debian:13"),
    "TORCH": ("rocm", "base"),
    "WHEELHOUSE": ("./a-wheels", "./b-wheels"),
    "RENDER_GROUP": ("44", "45"),
    "RUNS": ("./a-runs", "./b-runs"),
    "RUN_AS": ("1001:1001", "1002:1002"),
    "WORKSPACE": ("./a-work", "./b-work"),
    "WORKSPACE_READ_ONLY": ("true", "yes"),
    "DATA_DIR": ("./a-data", "./b-data"),
    "SHM_SIZE": ("1gb", "2gb"),
    "TMP_SIZE": ("1g", "2g"),
    "RESTART": ("no", "always"),
    "STOP_GRACE_PERIOD": ("41s", "42s"),
    "TENSORBOARD_PORT": ("6007", "6008"),
}
TOKENS = {"secrets/file": "the token of the file", "secrets/shell": "the token of the shell"}
PRINT = "import json, os; print(json.dumps(dict(os.environ)))"
NAMES = sorted(setting.name for setting in TABLE if setting.scope not in ("compose", "desk"))


def in_container(node: Node, env: dict[str, str], shell: dict[str, str]) -> dict[str, str]:
    """The container's environment. The kind of machine decides whether it can start here, so it stays cpu."""
    shell = {**shell, "HARDWARE": "cpu"}
    done = node.run("-c", PRINT, env=env, exports=shell, files=TOKENS, options=("--entrypoint", "python"))
    lines = [line for line in done.output.splitlines() if line.startswith("{")]
    assert done.code == 0, done.output
    environment: dict[str, str] = json.loads(lines[-1])
    return environment


def expected(values: dict[str, str]) -> dict[str, str]:
    seen = {name: value for name, value in values.items() if name != "HARDWARE"}
    # A file of the node is mounted; the container knows the place of the mount.
    return {**seen, "CLUSTER_TOKEN_FILE": "/run/secrets/cluster_token"}


def test_this_file_knows_every_documented_variable() -> None:
    assert sorted(IN_FILE) == sorted(IN_SHELL) == NAMES
    assert sorted(FOR_COMPOSE) == sorted(setting.name for setting in TABLE if setting.scope == "compose")


def test_in_the_container_the_shell_beats_the_file(cluster2: Cluster) -> None:
    seen = in_container(cluster2.nodes[0], IN_FILE, IN_SHELL)
    assert {name: seen.get(name) for name in expected(IN_SHELL)} == expected(IN_SHELL)


def test_in_the_container_the_file_beats_the_default(cluster2: Cluster) -> None:
    seen = in_container(cluster2.nodes[0], IN_FILE, {})
    assert {name: seen.get(name) for name in expected(IN_FILE)} == expected(IN_FILE)


def test_in_the_container_what_nobody_sets_is_unset_or_the_stacks_default(cluster2: Cluster) -> None:
    seen = in_container(cluster2.nodes[0], {}, {})
    assert {name: seen[name] for name in NAMES if name in seen and name != "HARDWARE"} == COMPOSE_DEFAULTS


# One of each kind that hardware/shell.yaml lists.
OF_OTHERS = (
    "TRAIN_STEPS",
    "NCCL_IB_TIMEOUT",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "HF_TOKEN",
    "SLURM_NODEID",
    "https_proxy",
)


def test_variables_that_are_no_settings_of_ours_follow_the_same_order(cluster2: Cluster) -> None:
    node = cluster2.nodes[0]
    in_file, in_shell = dict.fromkeys(OF_OTHERS, "7"), dict.fromkeys(OF_OTHERS, "8")
    seen = in_container(node, {**in_file, "MINE": "of the file"}, in_shell)
    assert {name: seen.get(name) for name in OF_OTHERS} == in_shell
    seen = in_container(node, {**in_file, "MINE": "of the file"}, {})
    assert {name: seen.get(name) for name in (*OF_OTHERS, "MINE")} == {**in_file, "MINE": "of the file"}
    assert not set(OF_OTHERS) & set(in_container(node, {}, {}))


def test_a_secret_reaches_the_script_but_not_the_engine(cluster2: Cluster) -> None:
    script = "import os; print('the script has', os.environ['HF_TOKEN'][::-1], os.environ['WANDB_API_KEY'])"
    files = {"secrets/env": "HF_TOKEN=2retnuh\nWANDB_API_KEY=of the file\n", "workspace/show.py": script}
    env = {"TRAIN_SCRIPT": "show.py", "NPROC_PER_NODE": "1"}
    stack = cluster2.nodes[0].up(env, exports={"WANDB_API_KEY": "of the shell"}, files=files)
    assert stack.wait(60) == 0, stack.tail()
    assert "the script has hunter2 of the shell" in stack.logs()
    assert "2retnuh" not in str(stack.attributes)
    cluster2.clear()


def test_an_empty_value_in_the_shell_reaches_the_container_as_empty_which_is_unset(cluster2: Cluster) -> None:
    node = cluster2.nodes[0]
    done = node.run("explain", "--json", env={"MAX_RESTARTS": "7"}, exports={"MAX_RESTARTS": ""})
    assert json.loads(done.output[done.output.index("{\n") :])["plan"]["max_restarts"] == 3


@pytest.mark.parametrize("source", ["file", "shell"])
def test_the_token_that_is_mounted_is_that_of_the_same_precedence(cluster2: Cluster, source: str) -> None:
    shell = {"CLUSTER_TOKEN_FILE": "./secrets/shell"} if source == "shell" else {}
    script = "print(open('/run/secrets/cluster_token').read())"
    env = {"CLUSTER_TOKEN_FILE": "./secrets/file"}
    done = cluster2.nodes[0].run("-c", script, env=env, exports=shell, files=TOKENS, options=("--entrypoint", "python"))
    assert f"of the {source}" in done.output


@pytest.mark.parametrize("name", sorted(FOR_COMPOSE))
def test_what_compose_reads_follows_the_same_order(cluster2: Cluster, name: str) -> None:
    of_file, of_shell = FOR_COMPOSE[name]
    node = cluster2.nodes[0]
    values = [
        as_compose_sees_it(name, node, env, shell)
        for env, shell in (({name: of_file}, {name: of_shell}), ({name: of_file}, {}), ({}, {}))
    ]
    assert values[:2] == [normal(of_shell), normal(of_file)]
    assert values[2] not in values[:2]


def as_compose_sees_it(name: str, node: Node, env: dict[str, str], shell: dict[str, str]) -> str:
    kind = {"HARDWARE": "rocm"} if name == "RENDER_GROUP" else {}
    stack = node.stack({"ENV_FILE": "", **env}, exports=kind | shell)
    # Compose resolves the folders; a build argument that nobody sets has no value.
    model = json.loads(
        stack.compose("--profile", "tensorboard", "config", "--format", "json").replace(f"{stack.folder}/", "")
    )
    service: dict[str, Any] = model["services"]["trainer"]
    mounts = {mount["target"]: mount["source"] for mount in service["volumes"]}
    read_only = any(mount.get("read_only") for mount in service["volumes"] if mount["target"] == "/workspace")
    return str(
        {
            "ENV_FILE": mounts["/etc/torchrun-compose/.env"],
            "IMAGE": service["image"],
            "BASE_IMAGE": service["build"]["args"].get("BASE_IMAGE"),
            "TORCH": service["build"]["args"]["TORCH"],
            "WHEELHOUSE": service["build"]["additional_contexts"]["wheels"],
            "RENDER_GROUP": service.get("group_add", [""])[-1],
            "RUNS": mounts["/runs"],
            "RUN_AS": service["user"],
            "WORKSPACE": mounts["/workspace"],
            # Compose knows yes and true as one.
            "WORKSPACE_READ_ONLY": (env | shell).get(name, "false") if read_only else "false",
            "DATA_DIR": mounts["/data"],
            "SHM_SIZE": service["shm_size"],
            "TMP_SIZE": service["tmpfs"][0].removeprefix("/tmp:size="),
            "RESTART": service["restart"],
            "STOP_GRACE_PERIOD": service["stop_grace_period"],
            "TENSORBOARD_PORT": model["services"]["tensorboard"]["entrypoint"][-1].removeprefix("--port="),
        }[name]
    )


def normal(text: str) -> str:
    """The value as compose's own output writes it."""
    if text.endswith("gb"):
        return str(int(text.removesuffix("gb")) * 2**30)
    return text.removeprefix("./")


READ = """
import json, os
from pathlib import Path
from app.config.settings import read_settings
settings = read_settings(os.environ, Path(".env"))
assert not settings.problems, settings.problems
print(json.dumps({name: (value.text, str(value.source)) for name, value in settings.values.items()}))
"""


def natively(folder: Path, env: dict[str, str], shell: dict[str, str], *command: str) -> dict[str, Any]:
    """What a command of Python prints in a folder with this .env, in a shell with nothing else set."""
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
    clean = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(PROJECT)}
    argv = [sys.executable, *command]
    done = subprocess.run(argv, cwd=folder, env={**clean, **shell}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def test_without_docker_the_shell_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    of_file = natively(tmp_path, IN_FILE, {}, "-c", READ)
    of_shell = natively(tmp_path, IN_FILE, IN_SHELL, "-c", READ)
    # The numbers are the lines of the file.
    lines = {name: [value, f".env:{number}"] for number, (name, value) in enumerate(IN_FILE.items(), start=1)}
    assert {name: of_file[name] for name in NAMES} == lines
    assert {name: of_shell[name] for name in NAMES} == {name: [IN_SHELL[name], "environment"] for name in NAMES}
    assert not set(NAMES) & set(natively(tmp_path, {}, {}, "-c", READ))


def test_without_docker_a_launch_uses_the_value_of_the_shell_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    for name, text in TOKENS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    explain = (str(PROJECT / "entrypoint.py"), "explain", "--json")
    # The one kind of machine that this one is; where file and shell say the same, the file's line is named.
    in_file = {name: value for name, value in IN_FILE.items() if name != "HARDWARE"}
    decisions = natively(tmp_path, in_file, {**IN_SHELL, "HARDWARE": "cpu"}, *explain)["decisions"]
    given = {decision["name"]: decision["source"] for decision in decisions if decision["name"] in NAMES}
    assert len(given) > 20
    assert set(given.values()) == {"environment"}
