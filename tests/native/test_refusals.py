"""Bad input without Docker: one clear message and exit code 2 before anything starts, all of it at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).parents[2] / "entrypoint.py"
# Root may read everything; without these two capabilities it is a user like others.
LIKE_A_USER = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()


def start(folder: Path, lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python entrypoint.py ARGUMENTS` in a folder with these lines as its .env."""
    (folder / ".env").write_text(lines, encoding="utf-8")
    return run(folder, *arguments)


def run(folder: Path, *arguments: str, through: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The same with the folder as it is, and nothing else in the environment."""
    command = [*through, sys.executable, str(ENTRYPOINT), *arguments]
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "NODES=192.0.2.251,192.0.2.252",
            "NODES=192.0.2.251,192.0.2.252 (.env:1): none of these is an address of this",
        ),
        ("\nNODES=127.0.0.1,127.0.0.2", "NODES=127.0.0.1,127.0.0.2 (.env:2): 2 of these are addresses of this machine"),
        (
            "NODES=127.0.0.1,127.0.0.2\nNODE_RANK=2",
            "NODE_RANK=2 (.env:2), but NODES lists 2 nodes: ranks run from 0 to 1",
        ),
        ("NODE_RANK=first", "NODE_RANK=first (.env:1) is not a number"),
        ("NODES=127.0.0.1,127.0.0.1\nNODE_RANK=0", "node 0 (127.0.0.1) and node 1 (127.0.0.1) are one machine"),
        ("NODES=127.0.0.1,no-such-host.invalid", "no-such-host.invalid has no address here"),
        ("MASTER_PORT=65536", "MASTER_PORT=65536 (.env:1) is out of range. Write a whole number from 1 to 65535."),
        ("CONTROL_PORT=29400", "CONTROL_PORT=29400 (.env:1) is MASTER_PORT as well"),
        ("TRAIN_SCRIPT=missing.py", "TRAIN_SCRIPT=missing.py (.env:1): there is no such file here."),
        ("TRAIN_ARGS='--name \"x'", "has broken shell quoting"),
        ("NPROC_PER_NODE=many", "NPROC_PER_NODE=many (.env:1) is neither a number of at least 1 nor auto, gpu or cpu."),
        ("NNODES=2", "NNODES=2 (.env:1), but NODE_RANK and MASTER_ADDR are not set"),
        ("this is no setting", ".env:1 is not a line of the form NAME=value"),
        ("NODES=127.0.0.1\nDATA=a\0b", ".env:2 is not a line of the form NAME=value"),
    ],
)
def test_bad_input_ends_with_one_message_and_code_2(lines: str, message: str, tmp_path: Path) -> None:
    done = start(tmp_path, lines)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert [entry.name for entry in tmp_path.iterdir()] == [".env"], "nothing was started, so nothing was written"


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    done = start(tmp_path, "MASTER_PORT=x\nNODE_RANK=y\nTRAIN_SCRIPT=missing.py\nNODERANK=1\n")
    assert done.returncode == 2
    assert "4 settings are wrong:" in done.stderr
    assert (
        "NODERANK (.env:4) is unknown to NCCL 2.30, Gloo, torch and torchrun-compose. Did you mean NODE_RANK?"
        in done.stderr
    )


def test_a_file_that_the_user_may_not_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("NODES=192.0.2.1\n", encoding="utf-8")
    file.chmod(0)
    done = run(tmp_path, through=LIKE_A_USER)
    assert done.returncode == 2
    assert ".env cannot be read: Permission denied." in done.stderr


@pytest.mark.parametrize("command", ["run", "explain", "doctor", "report", "firewall"])
def test_a_current_folder_that_was_deleted_is_one_sentence(command: str, tmp_path: Path) -> None:
    script = 'cd "$1"; rmdir "$1"; shift; exec "$@"'
    (tmp_path / "gone").mkdir()
    words = ["bash", "-c", script, "sh", str(tmp_path / "gone"), sys.executable, str(ENTRYPOINT), command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "torchrun-compose: The current folder was deleted. Change into the stack's folder again."
    ]


def test_a_misspelt_name_is_a_warning_and_the_training_runs(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text("print('hello')\n")
    done = start(tmp_path, "NCLL_DEBUG=INFO\nNPROC_PER_NODE=1\nTRAIN_SCRIPT=hello.py\n")
    assert done.returncode == 0, done.stderr
    assert (
        "warning: NCLL_DEBUG (.env:1) is unknown to NCCL 2.30, Gloo, torch and torchrun-compose. Did you mean NCCL_"
        in done.stderr
    )


def test_explain_of_broken_settings_says_what_is_broken_and_what_is_decided(tmp_path: Path) -> None:
    done = start(tmp_path, "MASTER_PORT=x\nTRAIN_SCRIPT=missing.py\n", "explain")
    assert done.returncode == 2
    assert done.stdout.count("problem: ") == 2
    assert "NODE_RANK=0 (derived): the only node" in done.stdout


def test_an_interpreter_without_any_package_is_enough_for_the_launcher(tmp_path: Path) -> None:
    # -S: nothing of site-packages is found.
    command = [sys.executable, "-S", str(ENTRYPOINT), "explain"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
