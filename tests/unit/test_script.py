"""What people write into TRAIN_SCRIPT, what their scripts say, and the folders they find."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from app.config.settings import read_settings
from app.host import Host
from app.host.mounts import Mount, mount_of, read_mounts
from app.host.paths import Seen, look_at, read_program
from app.plan import draft, probe_for
from app.plan.launchers import unwrap
from app.plan.places import on_host, results, volume
from app.plan.script_text import concerns
from tests.unit.launch_facts import given, machine, planned, reason, refused, warned

ROOT_MOUNT = Mount(point="/", source="/")
WORKSPACE = Mount(point="/workspace", source="/home/me/stack/workspace")
VOLUME = Mount(point="/runs", source="/var/lib/docker/volumes/torchrun-compose_runs/_data")


def container(*mounts: Mount, **facts: object) -> Host:
    return machine(container=True, cwd=Path("/workspace"), mounts=(*mounts, ROOT_MOUNT), uid=1000, gid=1000, **facts)


@pytest.mark.parametrize(
    ("written", "command"),
    [
        ("x.py --lr 1", ("x.py", "--lr", "1")),
        ("-m pkg.train --lr 1", ("-m", "pkg.train", "--lr", "1")),
        ("python x.py --lr 1", ("x.py", "--lr", "1")),
        ("/usr/bin/python3.11 -u -m pkg", ("-m", "pkg")),
        ("torchrun x.py", ("x.py",)),
        ("torchrun --standalone -m pkg a", ("-m", "pkg", "a")),
        ("python -m torch.distributed.run x.py --epochs 2", ("x.py", "--epochs", "2")),
        ("accelerate launch x.py --a", ("x.py", "--a")),
        ("accelerate launch --multi_gpu -m pkg --a", ("-m", "pkg", "--a")),
        ("deepspeed x.py --deepspeed ds.json", ("x.py", "--deepspeed", "ds.json")),
        ("bash run.sh", ("bash", "run.sh")),
    ],
)
def test_a_launcher_without_options_of_its_own_is_left_out(written: str, command: tuple[str, ...]) -> None:
    assert planned(machine(), TRAIN_SCRIPT=written).script.command == command


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("torchrun --nproc_per_node=8 --nnodes 2 x.py --lr 1", "TRAIN_SCRIPT='x.py --lr 1' NPROC_PER_NODE=8 NNODES=2."),
        ("torchrun --rdzv-backend c10d x.py", "TRAIN_SCRIPT=x.py. For --rdzv-backend see docs/own-script.md."),
        ("python -m torch.distributed.launch --nproc-per-node 4 x.py", "TRAIN_SCRIPT=x.py NPROC_PER_NODE=4."),
        ("accelerate launch --mixed_precision bf16 x.py", "TRAIN_SCRIPT=x.py ACCELERATE_MIXED_PRECISION=bf16."),
        ("accelerate launch --config_file fsdp.yaml x.py", "For --config_file see docs/own-script.md."),
        ("deepspeed --num_gpus=2 x.py", "TRAIN_SCRIPT=x.py NPROC_PER_NODE=2."),
        ("trl sft --output_dir out", "Write -m trl.scripts.sft --output_dir out."),
        ("axolotl train c.yaml", "Write -m axolotl.cli.train c.yaml."),
        ("mpirun -np 4 python x.py", "Write the script and its arguments alone."),
        ("accelerate launch", "Write the script and its arguments alone."),
        ("python -O x.py", "PYTHONOPTIMIZE=1 for -O"),
        ("python", "Write the script and its arguments alone"),
    ],
)
def test_any_other_launcher_is_answered_with_what_to_write_instead(written: str, instead: str) -> None:
    assert instead in refused(machine(), TRAIN_SCRIPT=written)


def test_a_program_of_the_image_is_found_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "my-trainer"
    program.write_text("#!/opt/venv/bin/python\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = given(TRAIN_SCRIPT="my-trainer --a")
    plan = draft(settings, probe_for(settings)).plan
    assert plan is not None
    assert plan.script.command == (str(program), "--a")
    wrong = given(TRAIN_SCRIPT="no-such-trainer")
    assert "no program of this name on PATH" in draft(wrong, probe_for(wrong)).problems[0].message


def test_explain_says_what_was_left_out() -> None:
    found = draft(given(TRAIN_SCRIPT="torchrun x.py"), machine())
    assert reason(found, "TRAIN_SCRIPT") == "x.py, without torchrun: torchrun starts it"


SETUP = """
import os
import torch.multiprocessing as mp
def setup(rank, world_size):
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = "12355"
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
if __name__ == "__main__":
    mp.spawn(setup, args=(2,), nprocs=2)
"""


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (SETUP, [5, 6, 9]),
        ('init_process_group("nccl", init_method="tcp://127.0.0.1:23456")', [1]),
        ('dist.init_process_group(init_method=f"tcp://localhost:{port}")', [1]),
        ('dist.init_process_group(rank=int(os.environ["LOCAL_RANK"]))', [1]),
        ("dist.init_process_group(rank=args.local_rank, world_size=4)", [1]),
        ("x = 1\nsampler = DistributedSampler(data, rank=local_rank)", [2]),
        ('p.add_argument("--local_rank", type=int)', [1]),
        ('os.environ["RANK"] = "0"', [1]),
        ("#!/bin/sh\nset -e\ntorchrun --nproc_per_node=8 x.py", [3]),
        ("cd /workspace\naccelerate launch x.py", [2]),
    ],
)
def test_a_script_that_finds_its_peers_in_its_own_way_is_told_with_the_line(text: str, lines: list[int]) -> None:
    assert [each.values["line"] for each in concerns("x.py", text, 2)] == [*map(str, lines)]


@pytest.mark.parametrize(
    "text",
    [
        'os.environ.setdefault("MASTER_PORT", "29500")',
        'if "RANK" not in os.environ:\n    os.environ["RANK"] = "0"\n    os.environ["MASTER_PORT"] = "1"',
        'os.environ["MASTER_PORT"] = str(free_port())',
        'init_process_group(init_method="tcp://10.0.0.1:23456", rank=rank, world_size=2)',
        'p.add_argument("--local_rank", default=int(os.environ["LOCAL_RANK"]))',
        "torch.cuda.set_device(local_rank)\ninit_process_group(rank=rank)",
        "#!/bin/sh\n# torchrun x.py\nexec python x.py",
        "DistributedSampler(data, rank=dist.get_rank())",
        "pool = multiprocessing.Pool(4)",
        "mp.spawn(saver, nprocs=1)",
        "a = (",
        "",
    ],
)
def test_what_may_be_meant_is_not_told(text: str) -> None:
    assert concerns("x.py", text, 2) == []


def test_on_one_node_the_own_address_of_a_script_will_do() -> None:
    text = (
        'os.environ["MASTER_ADDR"] = "127.0.0.1"\ninit_process_group(init_method="tcp://127.0.0.1:1", rank=local_rank)'
    )
    assert concerns("x.py", text, 1) == []


def test_a_warning_names_the_file_and_the_line() -> None:
    host = machine(program=("/workspace/my.py", 'x = 1\nos.environ["MASTER_PORT"] = "12355"\n'))
    assert "my.py:2: nobody listens on MASTER_PORT=12355" in warned(host, TRAIN_SCRIPT="my.py")
    assert "nobody listens" not in warned(host)


def test_only_the_beginning_of_a_long_script_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_bytes(b"#" * 1000 + b"\xff")
    assert read_program(str(tmp_path / "x.py"), limit=10) == (str(tmp_path / "x.py"), "#" * 10)
    assert read_program(str(tmp_path / "none.py")) == ("", "")
    assert read_program(str(tmp_path)) == ("", "")


def test_mounts_are_read_with_their_folder_on_the_host(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "1 0 0:50 / / ro,relatime - overlay overlay ro\n"
        "2 1 8:1 /home/me/my\\040stack/workspace /workspace rw,relatime - ext4 /dev/sda1 rw\n"
        "3 1 8:1 /srv/data /data ro,relatime - ext4 /dev/sda1 rw\n"
    )
    mounts = read_mounts(tmp_path)
    here = mount_of(Path("/workspace/out"), mounts)
    assert here == Mount(point="/workspace", source="/home/me/my stack/workspace", read_only=False)
    assert [mount.read_only for mount in mounts] == [False, True, True]
    assert mount_of(Path("/workspaces"), mounts) == Mount(point="/", source="/", read_only=True)
    assert read_mounts(tmp_path / "none") == ()


def test_a_path_of_the_container_is_told_as_the_host_has_it() -> None:
    host = container(WORKSPACE, VOLUME)
    assert on_host(Path("/workspace/out"), host, given()) == Path("/home/me/stack/workspace/out")
    assert on_host(Path("/tmp/x"), host, given()) is None
    assert on_host(Path("/workspace"), machine(mounts=(WORKSPACE,)), given()) is None
    place = on_host(Path("/runs/default"), host, given())
    assert place is not None
    assert volume(place) == "torchrun-compose_runs"
    assert volume(Path("/home/me")) == ""


def test_results_are_told_as_people_find_them() -> None:
    assert results(planned(machine(), RUNS_ROOT="/r").script) == "/r/default"
    own = planned(container(WORKSPACE, VOLUME), RUNS_ROOT="/runs", CHECKPOINT_DIR="out").script
    assert results(own) == (
        "/runs/default in volume torchrun-compose_runs (`docker compose cp trainer:/runs/default .`); "
        "checkpoints: /home/me/stack/workspace/out on this host"
    )


def test_a_file_system_of_its_own_for_home_is_known_by_what_the_user_wrote() -> None:
    host = container(Mount(point="/workspace", source="/me/stack/work"))
    settings = given(STACK_DIR="/home/me/stack", WORKSPACE="./work", RUNS="runs")
    assert on_host(Path("/workspace/a"), host, settings) == Path("/home/me/stack/work/a")
    elsewhere = given(STACK_DIR="/home/you", WORKSPACE="./work")
    assert on_host(Path("/workspace/a"), host, elsewhere) == Path("/me/stack/work/a")


def test_a_current_folder_that_cannot_be_written_is_told_with_the_command() -> None:
    host = container(WORKSPACE, files={".": Seen(kind="folder", obstacle=".", owner="1001:1002")})
    assert warned(host, TRAIN_SCRIPT="my.py").splitlines()[-1] == (
        "user 1000 cannot make files and folders in /workspace (/home/me/stack/workspace on the host): what the script "
        "writes into its current folder fails. Run `sudo chown -R 1000:1000 /home/me/stack/workspace`, or set "
        "RUN_AS=1001:1002, its owner; WORKSPACE_READ_ONLY=true says that it writes nothing there."
    )
    meant = container(Mount(point="/workspace", source="/w", read_only=True), files=host.files)
    assert "cannot make files" not in warned(meant, TRAIN_SCRIPT="my.py")
    assert "cannot make files" not in warned(host)


def test_a_volume_of_another_user_is_refused_with_the_command() -> None:
    host = container(VOLUME, files={"/runs/default": Seen(kind="missing", obstacle="/runs", owner="0:0")})
    place = "/var/lib/docker/volumes/torchrun-compose_runs/_data"
    assert refused(host, RUNS_ROOT="/runs").endswith(
        f"Run `sudo chown -R 1000:1000 {place}`, or set RUN_AS=0:0, its owner."
    )
    frozen = container(Mount(point="/runs", source="/r", read_only=True), files=host.files)
    assert "/runs is mounted read-only" in refused(frozen, RUNS_ROOT="/runs")


def test_the_owner_of_what_cannot_be_written_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    found = file.stat()
    seen = look_at(Path("/"), str(file / "below"))
    assert (seen.obstacle, seen.owner) == (str(file), f"{found.st_uid}:{found.st_gid}")
    assert look_at(Path("/"), str(tmp_path)).owner == ""


def test_home_of_a_container_lies_below_its_runs_for_each_user_and_compiled_code_for_each_node_and_image() -> None:
    host = container(VOLUME, packages={"torch": "2.13.0"}, hostname="gpu-a")
    script = planned(host, RUNS_ROOT="/runs", HOME="/tmp").script
    assert script.home == Path("/runs/.home/1000")
    assert script.env["HOME"] == "/runs/.home/1000"
    assert "USER" in script.env
    names = ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    caches = {str(Path(script.env[name]).parent) for name in names}
    assert all(each.startswith("/runs/.home/1000/.cache/compiled/gpu-a-") for each in caches)
    for other in (replace(host, hostname="gpu-b"), replace(host, packages={"torch": "2.14.0"})):
        caches.add(str(Path(planned(other, RUNS_ROOT="/runs", HOME="/tmp").script.env[names[0]]).parent))
    assert len(caches) == 3


def test_a_home_that_the_user_names_stays_and_so_does_that_of_a_bare_machine() -> None:
    assert planned(container(), RUNS_ROOT="/runs", HOME="/workspace/home").script.home is None
    bare = planned(machine(), HOME="/home/me").script
    assert bare.home is None
    assert "TORCHINDUCTOR_CACHE_DIR" not in bare.env


def test_a_secret_reaches_the_script_and_no_output(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/env").write_text("HF_TOKEN=hunter2\nNCCL_DEBUG=INFO\nMAX_RESTARTS=lots\n")
    settings = read_settings({}, tmp_path / ".env")
    assert (settings.values["HF_TOKEN"].secret, settings.values["HF_TOKEN"].source) == (True, "secrets/env:1")
    assert [problem.message for problem in settings.problems] == [
        "MAX_RESTARTS=(secret) (secrets/env:3) is not a number. Write a whole number of at least 0."
    ]
    (tmp_path / "secrets/env").write_text("HF_TOKEN=hunter2\nNCCL_DEBUG=INFO\n")
    found = draft(read_settings({}, tmp_path / ".env"), machine())
    assert found.plan is not None
    assert "hunter2" in found.plan.script.env.values()
    assert {each.name: each.value for each in found.decisions}["NCCL_DEBUG"] == "(secret)"


def test_the_shell_and_the_env_file_win_over_the_secrets(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/env").write_text("A=secret\nB=secret\nC=secret\n")
    (tmp_path / ".env").write_text("B=file\n")
    values = read_settings({"A": "shell", "C": "secret"}, tmp_path / ".env").values
    assert {name: (values[name].text, values[name].secret) for name in "ABC"} == {
        "A": ("shell", False),
        "B": ("file", False),
        "C": ("secret", True),
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_secrets_that_cannot_be_read_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/env").touch(mode=0o000)
    assert "Make it readable by this user" in read_settings({}, tmp_path / ".env").problems[0].message


def test_any_words_are_a_command_or_an_answer() -> None:
    for words in ([], ["-m"], ["torchrun", "-m"], ["python", "-m"], ["accelerate"], ["trl"], ["python", "torchrun"]):
        assert unwrap(words).wrong or unwrap(words).words == tuple(words) or unwrap(words).left_out
