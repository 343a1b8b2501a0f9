"""How many processes on which device, and which script with which arguments."""

from pathlib import Path

import pytest

from app.config.settings import read_settings
from app.host.accelerators.gpu import Gpu, Gpus
from app.host.limits import Limits
from app.host.paths import Seen
from app.plan import draft, probe_for
from app.plan.script import SHORTEST_TOKEN, files_to_look_at
from tests.unit.launch_facts import decide, machine, planned, reason, refused, warned

CPUS = Limits(cpus=8, shm=64 << 30)
TWO_GPUS = Gpus(visible=(Gpu(index=0), Gpu(index=1)), on_bus=("0000:01:00.0", "0000:02:00.0"), driver="580.1")
GPU_HOST = machine(gpus=TWO_GPUS, limits=CPUS, packages={"torch": "2.13.0"}, container=True)
CPU_HOST = machine(limits=CPUS, container=True)
HIDDEN = machine(limits=CPUS, container=True, gpus=Gpus(on_bus=("0000:01:00.0", "0000:02:00.0")))


@pytest.mark.parametrize(
    ("text", "on_gpus", "on_cpus"),
    [("auto", (2, "nccl"), (8, "gloo")), ("cpu", (8, "gloo"), (8, "gloo")), ("1", (1, "nccl"), (1, "gloo"))],
)
def test_nproc_means_what_torchrun_takes_it_for(text: str, on_gpus: tuple[int, str], on_cpus: tuple[int, str]) -> None:
    for host, expected in ((GPU_HOST, on_gpus), (CPU_HOST, on_cpus)):
        plan = planned(host, NPROC_PER_NODE=text)
        assert (plan.workers.nproc, plan.workers.backend) == expected
        assert plan.script.env["BACKEND"] == plan.workers.backend


def test_gpu_asks_for_gpus() -> None:
    assert planned(GPU_HOST, NPROC_PER_NODE="gpu").workers.nproc == 2
    assert "there is no GPU here. Set a number or cpu, or give the container its GPUs with HARDWARE=nvidia." in refused(
        CPU_HOST, NPROC_PER_NODE="gpu"
    )
    assert "or install the NVIDIA driver." in refused(machine(limits=CPUS), NPROC_PER_NODE="gpu")


def test_a_mask_that_hides_all_gpus_is_named_as_the_cause() -> None:
    assert refused(GPU_HOST, NPROC_PER_NODE="gpu", CUDA_VISIBLE_DEVICES="-1") == (
        "NPROC_PER_NODE=gpu (environment), but CUDA_VISIBLE_DEVICES=-1 (environment) leaves no GPU. Set a number or "
        "cpu, or correct CUDA_VISIBLE_DEVICES."
    )
    assert "but CUDA_VISIBLE_DEVICES=-1 (environment) leaves no GPU" in refused(
        GPU_HOST, BACKEND="nccl", CUDA_VISIBLE_DEVICES="-1"
    )


def test_hardware_cpu_asks_for_workers_on_the_cpu_without_docker_too() -> None:
    found = decide(GPU_HOST, HARDWARE="cpu")
    assert found.plan is not None
    assert (found.plan.workers.backend, found.plan.workers.nproc, found.warnings) == ("gloo", 8, ())
    assert reason(found, "BACKEND") == "HARDWARE=cpu asks for workers on the CPU"
    cpu_build = machine(gpus=TWO_GPUS, limits=CPUS, packages={"torch": "2.13.0+cpu"})
    assert warned(cpu_build, HARDWARE="cpu") == ""
    assert planned(GPU_HOST, HARDWARE="cpu", BACKEND="nccl").workers.backend == "nccl"


def test_more_processes_than_gpus_are_refused_for_nccl_only() -> None:
    assert "but this node has 2 usable GPUs" in refused(GPU_HOST, NPROC_PER_NODE="3")
    assert planned(GPU_HOST, NPROC_PER_NODE="3", BACKEND="gloo").workers.nproc == 3


@pytest.mark.parametrize(
    ("mask", "count"),
    [
        *(("1", 1), ("0,1", 2), ("1,7,0", 1), ("-1", 0), ("0,0", 0), ("0,x,1", 1)),
        *(("GPU-aa,GPU-bb", 2), ("GPU-aa,MIG-bb", 1), ("GPU-aa,GPU-aa", 0)),
    ],
)
def test_cuda_visible_devices_limits_the_gpus(mask: str, count: int) -> None:
    found = decide(GPU_HOST, CUDA_VISIBLE_DEVICES=mask)
    assert next(each.value for each in found.decisions if each.name == "GPUs") == str(count)


def test_nccl_without_gpus_or_cuda_is_refused() -> None:
    assert "there is no GPU here" in refused(CPU_HOST, BACKEND="nccl")
    assert "at most 0" not in refused(CPU_HOST, BACKEND="nccl", NPROC_PER_NODE="2")
    cpu_build = machine(gpus=TWO_GPUS, limits=CPUS, packages={"torch": "2.13.0+cpu"})
    assert "is built without CUDA" in refused(cpu_build, BACKEND="nccl")
    assert planned(cpu_build).workers.backend == "gloo"
    assert "training runs on the CPU" in warned(cpu_build)


def test_gpus_that_the_container_was_not_given_are_an_error_that_says_which_word_to_set() -> None:
    assert refused(HIDDEN) == (
        "HARDWARE is not set, and this machine has 2 NVIDIA GPUs that the container was not given. Set HARDWARE=nvidia "
        "in .env (or HARDWARE=cpu to train without them)."
    )
    assert planned(HIDDEN, HARDWARE="cpu").workers.backend == "gloo"


def test_a_bare_machine_without_a_driver_is_only_warned() -> None:
    host = machine(limits=CPUS, gpus=Gpus(on_bus=("0000:01:00.0",)))
    assert "has 1 NVIDIA GPU, but no driver offers them" in warned(host)


def test_hardware_that_promises_gpus_where_none_are_is_refused() -> None:
    assert "but no GPU is here" in refused(CPU_HOST, HARDWARE="nvidia")
    assert planned(CPU_HOST, HARDWARE="nvidia", BACKEND="gloo").workers.backend == "gloo"


@pytest.mark.parametrize(("nproc", "threads"), [("1", "8"), ("2", "4"), ("3", "2"), ("16", "1")])
def test_threads_are_the_cpus_shared_by_the_processes(nproc: str, threads: str) -> None:
    assert planned(CPU_HOST, NPROC_PER_NODE=nproc).script.env["OMP_NUM_THREADS"] == threads


def command(*argv: str, **environ: str) -> tuple[str, ...]:
    settings = read_settings(environ, None, argv)
    plan = draft(settings, machine(files={"train.py": Seen(digest="abc")})).plan
    assert plan is not None
    return plan.script.command


def test_the_script_comes_from_arguments_then_settings_then_this_project() -> None:
    assert command() == ("-m", "app.train")
    assert command(TRAIN_ARGS="--name 'a b'") == ("-m", "app.train", "--name", "a b")
    assert command(TRAIN_SCRIPT="train.py", TRAIN_ARGS="--lr 1") == ("train.py", "--lr", "1")
    assert command("train.py", "--x", TRAIN_SCRIPT="-m mine", TRAIN_ARGS="--lr 1") == ("train.py", "--x")
    assert command("-m", "pkg.mod", "1") == ("-m", "pkg.mod", "1")
    assert command("--steps", "9", TRAIN_SCRIPT="train.py", TRAIN_ARGS="--lr 1") == ("train.py", "--steps", "9")


def test_only_this_projects_modules_change_the_python_path() -> None:
    assert planned(CPU_HOST).script.env["PYTHONPATH"] == str(CPU_HOST.project)
    assert planned(CPU_HOST, PYTHONPATH="/mine").script.env["PYTHONPATH"] == f"{CPU_HOST.project}:/mine"
    assert "PYTHONPATH" not in planned(CPU_HOST, TRAIN_SCRIPT="-m mine").script.env


def test_a_missing_script_is_refused() -> None:
    host = machine(files={"/workspace/no.py": Seen(kind="missing")})
    assert "there is no such file here" in refused(host, TRAIN_SCRIPT="/workspace/no.py")
    assert planned(host, TRAIN_SCRIPT="-m no.such.module").script.command == ("-m", "no.such.module")
    assert "names no script" in refused(host, TRAIN_SCRIPT="-m")
    assert refused(machine(module=False), TRAIN_SCRIPT="-m no.such.module") == (
        "TRAIN_SCRIPT=-m no.such.module (environment): Python finds no 'no' here. Correct the name, or set PYTHONPATH."
    )


@pytest.mark.parametrize(
    ("script", "seen", "wrong"),
    [
        ("/tmp", Seen(kind="folder"), "this is a folder. Write the path of a script, or -m for a module."),
        ("x.py", Seen(kind="unreadable"), "user 0 cannot read it. Let that user read it, or correct the path."),
        ("x.py --lr 1", Seen(kind="missing"), "x.py: there is no such file here. Correct the path, or write -m for a "),
    ],
)
def test_a_script_that_cannot_be_started_is_refused_with_its_cure(script: str, seen: Seen, wrong: str) -> None:
    host = machine(files={script.partition(" ")[0]: seen})
    assert f"TRAIN_SCRIPT={script} (environment): {wrong}" in refused(host, TRAIN_SCRIPT=script)


def test_a_space_in_the_name_of_a_script_is_told(tmp_path: Path) -> None:
    file = tmp_path / "my script.py"
    file.touch()
    settings = read_settings({"TRAIN_SCRIPT": str(file)}, None)
    problems = draft(settings, probe_for(settings)).problems
    assert [problem.message for problem in problems] == [
        f"TRAIN_SCRIPT={file} (environment): the space ends the name. Quote it in the value: TRAIN_SCRIPT=\"'{file}'\"."
    ]
    quoted = read_settings({"TRAIN_SCRIPT": f"'{file}'"}, None)
    assert draft(quoted, probe_for(quoted)).problems == ()


def test_the_arguments_of_the_script_are_a_thing_of_their_own() -> None:
    found = decide(CPU_HOST, TRAIN_ARGS='--a "b c"')
    shown = {each.name: (each.value, each.source) for each in found.decisions}
    assert shown["TRAIN_SCRIPT"] == ("-m app.train", "default")
    assert shown["TRAIN_ARGS"] == ('--a "b c"', "environment")
    settings = read_settings({"TRAIN_ARGS": "--a"}, None, ["--steps", "9"])
    assert reason(draft(settings, CPU_HOST), "TRAIN_ARGS") == "in place of TRAIN_ARGS=--a (environment)"


@pytest.mark.parametrize(
    ("environ", "path", "cause"),
    [
        ({"RUN_DIR": "/ro/x"}, "/ro/x", "RUN_DIR=/ro/x (environment)"),
        ({"CHECKPOINT_DIR": "/ro/x/"}, "/ro/x", "CHECKPOINT_DIR=/ro/x/ (environment)"),
        ({"RUNS_ROOT": "/ro"}, "/ro/default", "RUNS_ROOT=/ro (environment)"),
        ({}, "runs/default", "RUNS_ROOT=runs (default)"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_starts(
    environ: dict[str, str], path: str, cause: str
) -> None:
    host = machine(files={path: Seen(kind="missing", obstacle="/ro")}, uid=1000)
    assert path in files_to_look_at(read_settings(environ, None))
    assert refused(host, **environ) == (
        f"{cause}: user 1000 cannot make files and folders in /ro. Correct the path, or let that user write there."
    )


def test_the_scripts_content_must_be_equal_on_all_nodes() -> None:
    plan = planned(machine(files={"train.py": Seen(digest="abc")}), TRAIN_SCRIPT="train.py")
    assert ("content of train.py", "abc") in plan.equal


def test_folders_follow_the_run_unless_they_are_set() -> None:
    host = machine(cwd=Path("/here"))
    plan = planned(host, RUN_NAME="r1")
    assert (plan.script.run_dir, plan.script.checkpoint_dir) == (
        Path("/here/runs/r1"),
        Path("/here/runs/r1/checkpoints"),
    )
    assert plan.script.env["TORCH_FR_DUMP_TEMP_FILE"] == "/here/runs/r1/logs/node0/flight_recorder_rank_"
    own = planned(host, RUNS_ROOT="/runs", CHECKPOINT_DIR="/nfs/c")
    assert (own.script.run_dir, own.script.env["CHECKPOINT_DIR"]) == (Path("/runs/default"), "/nfs/c")


def test_a_token_file_must_be_there_and_hold_a_token() -> None:
    token = {"CLUSTER_TOKEN_FILE": "/t"}
    wrong = {
        "there is no such file.": Seen(kind="missing"),
        "this is a folder.": Seen(kind="folder"),
        "it holds only 3 bytes. Make one with `make token`": Seen(size=3),
    }
    for message, seen in wrong.items():
        assert f"CLUSTER_TOKEN_FILE=/t (environment): {message}" in refused(machine(files={"/t": seen}), **token)
    told = refused(machine(files={"/t": Seen(kind="unreadable")}, uid=1001), **token)
    assert "`sudo chown 1001 FILE && sudo chmod 0400 FILE`" in told
    assert planned(machine(files={"/t": Seen(size=SHORTEST_TOKEN)}), **token).token_file == Path("/t")


def test_ports_follow_master_port_and_must_differ() -> None:
    plan = planned(CPU_HOST, MASTER_PORT="5000")
    assert (plan.network.control_port, plan.script.env["NCCL_RAS_ADDR"]) == (5001, "localhost:5002")
    top = planned(CPU_HOST, MASTER_PORT="65535")
    assert (top.network.control_port, top.script.env["NCCL_RAS_ADDR"]) == (65534, "localhost:65533")
    assert "Give them different ports" in refused(CPU_HOST, MASTER_PORT="5000", CONTROL_PORT="5000")
    assert planned(CPU_HOST, MASTER_PORT="5000", CONTROL_PORT="5002").script.env["NCCL_RAS_ADDR"] == "localhost:5003"


def test_ports_that_need_root_or_may_be_taken_are_warned_about() -> None:
    assert "MASTER_PORT=80 (environment) needs root" in warned(machine(uid=1000), MASTER_PORT="80", CONTROL_PORT="2000")
    assert warned(machine(uid=0), MASTER_PORT="80", CONTROL_PORT="2000") == ""
    assert "CONTROL_PORT=40001 (derived) is one of the ports that the kernel hands out by itself" in warned(
        machine(ephemeral_ports=(32768, 60999)), MASTER_PORT="40000"
    )


def test_fewer_nodes_than_min_nodes_are_refused() -> None:
    assert "but the job trains on 1 node. Set at most 1." in refused(CPU_HOST, MIN_NODES="2")


@pytest.mark.parametrize(
    ("period", "grace", "told"),
    [("", "30", ""), ("", "56", "61s"), ("1m30s", "85", ""), ("90s", "86", "91s"), ("soon", "999", "")],
)
def test_a_grace_that_docker_cuts_short_is_told(period: str, grace: str, told: str) -> None:
    text = warned(CPU_HOST, STOP_GRACE=grace, STOP_GRACE_PERIOD=period)
    assert (f"Set STOP_GRACE_PERIOD={told} or more in .env" in text) == bool(told), text
    assert warned(machine(limits=CPUS), STOP_GRACE="999") == ""


def test_limits_below_what_the_plan_needs_are_told() -> None:
    small = machine(gpus=TWO_GPUS, limits=Limits(cpus=8, shm=64 << 20, open_files=1024, memory=1 << 30))
    text = warned(small)
    assert "Shared memory (/dev/shm) has 64 MiB; NCCL with 2 processes will take about 2 GiB. Set SHM_SIZE" in text
    assert "Only 1024 files and connections may be open at once (the hard limit)" in text
    one = machine(limits=Limits(cpus=8, shm=32 << 20, open_files=1 << 20))
    (warning,) = planned(one, NPROC_PER_NODE="1").warnings
    assert (warning.id, warning.setting) == ("limits.shm", "SHM_SIZE")
    assert warning.values == {"size": "32 MiB", "wanted": "64 MiB", "nproc": 1, "nccl": False}
    assert "The memory limit is 1 GiB for 2 processes" in text


def test_a_reason_names_the_driver() -> None:
    assert reason(decide(GPU_HOST), "GPUs") == "GPU; driver 580.1"
