"""Settings: sources, empty values, broken values, and one table for code, `.env.example` and compose.yaml."""

import os
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pytest

from app.config import envfile
from app.config.settings import TABLE, Setting, Settings, read_settings
from app.plan.typos import known_variables
from app.train import settings as train
from tests.unit.launch_facts import card, machine, planned

PROJECT = Path(__file__).parents[2]


WORDS = {
    "HARDWARE": ("cpu", "nvidia"),
    "BACKEND": ("gloo", "nccl"),
    "PRELOAD": ("torch", "torch,numpy"),
    "REGROW": ("checkpoint", "failure"),
    "CHECKPOINTS": ("own", "mirror"),
    "MIRROR_LIMIT": ("2GB", "3TB"),
    "NOTIFY": ("json://one/key", "json://two/key"),
} | dict.fromkeys(("NCCL_IB_DISABLE", "CUDA_LAUNCH_BLOCKING"), ("0", "1"))


def read(tmp_path: Path, lines: str, **environ: str) -> Settings:
    file = tmp_path / ".env"
    file.write_text(lines, encoding="utf-8")
    return read_settings(environ, file)


def given(settings: Settings, name: str) -> tuple[str, str]:
    """The text of a setting and its source."""
    value = settings.of(name)
    assert value is not None
    return value.text, value.source


def messages(settings: Settings) -> list[str]:
    return [problem.message for problem in settings.problems]


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    settings = read(tmp_path, "MASTER_PORT=1111\nRUN_NAME=file\n", MASTER_PORT="2222")
    assert given(settings, "MASTER_PORT") == ("2222", "environment")
    assert given(settings, "RUN_NAME") == ("file", ".env:2")
    assert given(settings, "MAX_RESTARTS") == ("3", "default")


@pytest.mark.parametrize(
    "setting", [each for each in TABLE if each.scope not in ("compose", "desk")], ids=lambda each: each.name
)
def test_shell_beats_file_beats_default_for_every_setting(setting: Setting, tmp_path: Path) -> None:
    name = setting.name
    one, two = WORDS.get(name, ("41", "42"))
    assert given(read(tmp_path, f"{name}={one}", **{name: two}), name) == (two, "environment")
    assert given(read(tmp_path, f"{name}={one}"), name) == (one, ".env:1")
    unset = read(tmp_path, "").of(name)
    assert unset is None or unset.source == "default"


@pytest.mark.parametrize(("lines", "environ"), [("PRELOAD=", {}), ("PRELOAD=torch", {"PRELOAD": ""})])
def test_an_empty_preload_is_a_value(lines: str, environ: dict[str, str], tmp_path: Path) -> None:
    preload = read(tmp_path, lines, **environ).preload
    assert (preload.value, preload.source) == ((), "environment" if environ else ".env:1")


@pytest.mark.parametrize("text", ["torch,", "torch transformers", "torch;os", "1torch", "torch.", "../torch"])
def test_a_preload_that_is_no_list_of_modules_is_refused(text: str, tmp_path: Path) -> None:
    assert [problem.setting for problem in read(tmp_path, "", PRELOAD=text).problems] == ["PRELOAD"]


def test_a_value_that_compose_passed_on_from_the_file_is_the_files_line(tmp_path: Path) -> None:
    settings = read(tmp_path, "# nodes\n\nNODES=10.0.0.1,10.0.0.2 # two\n", NODES="10.0.0.1,10.0.0.2")
    assert given(settings, "NODES") == ("10.0.0.1,10.0.0.2", ".env:3")


def test_an_empty_value_is_unset_even_over_a_line_of_the_file(tmp_path: Path) -> None:
    settings = read(tmp_path, "NODE_RANK=1\nNODES=\nRUN_NAME=' '\n", NODE_RANK="")
    assert not settings.is_set("NODE_RANK")
    assert not settings.is_set("NODES")
    assert settings.run_name.value == "default"


def test_the_last_of_two_lines_wins_and_nothing_is_interpolated(tmp_path: Path) -> None:
    settings = read(tmp_path, 'RUN_NAME=a\nexport RUN_NAME="b"\nTRAIN_ARGS=$HOME ${RUN_NAME}\n')
    assert given(settings, "RUN_NAME") == ("b", ".env:2")
    assert settings.text("TRAIN_ARGS") == "$HOME ${RUN_NAME}"


def test_a_line_that_is_no_assignment_is_named_without_its_text(tmp_path: Path) -> None:
    settings = read(tmp_path, "NODES=10.0.0.1\n\nsecret-without-a-name\n")
    assert messages(settings) == [
        ".env:3 is not a line of the form NAME=value. Correct it or put a # before it.",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("NODE_RANK=one", "NODE_RANK=one (.env:1) is not a number. Write a whole number of at least 0."),
        ("NODE_RANK=-1", "NODE_RANK=-1 (.env:1) is out of range. Write a whole number of at least 0."),
        ("MASTER_PORT=0", "MASTER_PORT=0 (.env:1) is out of range. Write a whole number from 1 to 65535."),
        ("CONTROL_PORT=65536", "CONTROL_PORT=65536 (.env:1) is out of range. Write a whole number from 1 to 65535."),
        (
            "NPROC_PER_NODE=0",
            "NPROC_PER_NODE=0 (.env:1) is neither a number of at least 1 nor auto, gpu or cpu. Write one of these.",
        ),
        ("BACKEND=mpi", "BACKEND=mpi (.env:1) is unknown. Write one of auto, gloo, nccl."),
        # NCCL and CUDA read a number: to them "yes" is 0.
        ("NCCL_IB_DISABLE=yes", "NCCL_IB_DISABLE=yes (.env:1) is unknown. Write one of 0, 1."),
        ("CUDA_LAUNCH_BLOCKING=on", "CUDA_LAUNCH_BLOCKING=on (.env:1) is unknown. Write one of 0, 1."),
        ("OMP_NUM_THREADS=0", "OMP_NUM_THREADS=0 (.env:1) is out of range. Write a whole number of at least 1."),
        ("START_TIMEOUT=5m", "START_TIMEOUT=5m (.env:1) is not a number of seconds. Write one like 30 or 2.5."),
        ("HEARTBEAT_TIMEOUT=0.5", "HEARTBEAT_TIMEOUT=0.5 (.env:1) is too short. Write at least 1 second."),
        (
            "RUN_NAME=../other",
            "RUN_NAME=../other (.env:1) is not a folder's name. Write up to 64 letters, digits, dots, dashes or "
            "underscores.",
        ),
        (
            "TRAIN_ARGS=--name \"it's",
            "TRAIN_ARGS=--name \"it's (.env:1) has broken shell quoting (no closing quotation). Close the quote or "
            "escape it with \\.",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_line_and_the_fix(line: str, message: str, tmp_path: Path) -> None:
    assert messages(read(tmp_path, line)) == [message]


def test_all_wrong_values_are_told_at_once_and_read_as_unset(tmp_path: Path) -> None:
    settings = read(tmp_path, "MASTER_PORT=x\nNODE_RANK=y\nBACKEND=z\n")
    assert len(settings.problems) == 3
    assert settings.master_port.value == 29400
    assert not settings.is_set("NODE_RANK")


def test_a_setting_means_what_its_text_says(tmp_path: Path) -> None:
    lines = "MASTER_PORT=5\nSTOP_GRACE=2.5\nTRAIN_ARGS=--a 'b c'\nRUN_DIR=/r\nNODES=[::1] a;b # c\nNPROC_PER_NODE=3\n"
    settings = read(tmp_path, lines + "STOP_GRACE_PERIOD=1m30s\n")
    found = {
        each: getattr(getattr(settings, each), "value", None) for each in ("master_port", "stop_grace", "train_args")
    }
    assert found == {"master_port": 5, "stop_grace": 2.5, "train_args": ("--a", "b c")}
    assert (settings.run_dir and settings.run_dir.value) == Path("/r")
    assert (settings.nodes and settings.nodes.value) == ("::1", "a", "b")
    assert (settings.nproc_per_node.value, settings.stop_grace_period.value) == (3, 90.0)
    assert read(tmp_path, "STOP_GRACE_PERIOD=soon").stop_grace_period.value is None
    assert read(tmp_path, "").train_script.value == ("-m", "app.train")


def test_a_wrong_value_has_an_id_of_the_check_that_it_concerns(tmp_path: Path) -> None:
    settings = read(tmp_path, "MASTER_PORT=x\nNODE_RANK=-1\nBACKEND=z\nSTOP_GRACE=x\n")
    assert [(each.id, each.setting, each.severity) for each in settings.problems] == [
        ("rank.out-of-range", "NODE_RANK", "error"),
        ("ports.not-a-number", "MASTER_PORT", "error"),
        ("gpus.unknown-word", "BACKEND", "error"),
        ("settings.not-seconds", "STOP_GRACE", "error"),
    ]


def test_a_kind_of_machine_is_a_file_of_the_folder_hardware(tmp_path: Path) -> None:
    kinds = {file.stem for file in (PROJECT / "hardware").glob("*.yaml")} - {"shell"}
    (problem,) = read(tmp_path, "HARDWARE=gpu").problems
    assert problem.id == "gpus.unknown-word"
    assert set(problem.remedy.removeprefix("Write one of ").split(", ")) == kinds


def test_a_missing_default_file_is_no_file(tmp_path: Path) -> None:
    assert read_settings({}, tmp_path / ".env").problems == ()


def test_a_missing_file_that_the_user_named_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "other.env"
    assert messages(read_settings({"ENV_FILE": str(file)}, file)) == [
        f"ENV_FILE={file} (environment): there is no such file. Correct the path or unset ENV_FILE."
    ]


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    # A folder stands for a file without permission, which root, who may run the tests, could read.
    assert messages(read_settings({}, tmp_path)) == [
        f"{tmp_path} cannot be read: it is a folder. Write lines of the form NAME=value into a file, or name another "
        "file with ENV_FILE."
    ]
    (tmp_path / "latin").write_bytes(b"NAME=\xff\n")
    assert "it is not UTF-8 text. Save it as UTF-8, or name" in messages(read_settings({}, tmp_path / "latin"))[0]


def test_the_file_that_compose_mounts_only_names_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envfile, "MOUNTED", tmp_path)
    settings = read_settings({"NODES": "10.0.0.1"}, tmp_path)
    assert settings.problems == ()
    assert given(settings, "NODES") == ("10.0.0.1", "environment")


def test_what_compose_gives_every_container_is_not_taken_for_the_users() -> None:
    settings = read_settings({"RUNS_ROOT": "/runs", "STOPPED_EXIT_CODE": "7"}, envfile.MOUNTED)
    assert given(settings, "RUNS_ROOT") == ("/runs", "compose.yaml")
    assert given(settings, "STOPPED_EXIT_CODE") == ("7", "environment")
    assert given(read_settings({"RUNS_ROOT": "/runs"}, None), "RUNS_ROOT") == ("/runs", "environment")
    stack = (PROJECT / "compose.yaml").read_text(encoding="utf-8")
    assert dict(re.findall(r"^ {6}([A-Z_]+): \$\{\1:[-+](.+)\}$", stack, re.MULTILINE)) == envfile.FROM_COMPOSE


@pytest.mark.parametrize("line", ["RUNS_ROOT=~/runs", "CHECKPOINT_DIR=$HOME/ck", "RUN_DIR=/x/${USER}"])
def test_a_path_that_a_shell_would_expand_is_refused(line: str, tmp_path: Path) -> None:
    assert messages(read(tmp_path, line)) == [
        f"{line} (.env:1) would be taken literally: ~ and $ are not expanded here. Write the whole path."
    ]
    assert read(tmp_path, "RUN_DIR=/a~b").problems == ()


def test_a_secret_is_not_in_the_settings_text() -> None:
    assert "hunter2" not in repr(read_settings({"WANDB_API_KEY": "hunter2"}, None))


def example_names() -> list[str]:
    lines = (PROJECT / ".env.example").read_text(encoding="utf-8").splitlines()
    return [match[1] for line in lines if (match := re.match(r"(?:# )?([A-Z][A-Z0-9_]+)=", line))]


def test_the_example_describes_each_setting_of_the_table_once() -> None:
    assert sorted(example_names()) == sorted(setting.name for setting in TABLE)


def test_the_example_shows_the_defaults_of_the_table() -> None:
    text = (PROJECT / ".env.example").read_text(encoding="utf-8")
    for setting in TABLE:
        # RUNS_ROOT's differs between the image and a bare machine, STOPPED_EXIT_CODE's too: their comments say so.
        if setting.default is not None and setting.name not in ("RUNS_ROOT", "STOPPED_EXIT_CODE"):
            assert f"# {setting.name}={setting.default}\n" in text


def test_the_example_is_valid_as_it_stands(tmp_path: Path) -> None:
    settings = read(tmp_path, (PROJECT / ".env.example").read_text(encoding="utf-8"))
    assert settings.problems == ()
    assert set(settings.values) == {"ENV_FILE"}


def test_every_line_of_the_example_is_valid_without_its_comment_sign(tmp_path: Path) -> None:
    text = (PROJECT / ".env.example").read_text(encoding="utf-8")
    assert read(tmp_path, re.sub(r"^# (?=[A-Z][A-Z0-9_]+=)", "", text, flags=re.MULTILINE)).problems == ()


def test_every_variable_that_we_know_passes_from_the_shell() -> None:
    listed = re.findall(r"^ {6}([A-Za-z_0-9]+):$", (PROJECT / "hardware/shell.yaml").read_text(), re.MULTILINE)
    stack = (PROJECT / "compose.yaml").read_text(encoding="utf-8")
    passed = {*listed, *re.findall(r"^ {6}([A-Z][A-Z0-9_]+):", stack, re.MULTILINE)}
    # torchrun's own, what the image sets, and folders, which are others in the container.
    not_passed = re.compile(r"TORCHELASTIC_|.*(_HOME|_VERSION|_CACHE_PATH|_CACHE_DIR|_EXTENSIONS_DIR)$")
    assert {name for name in known_variables() if not not_passed.match(name)} <= passed
    of_train = {item.metadata["variable"] or f"TRAIN_{item.name.upper()}" for item in fields(train.TrainSettings)}
    assert of_train <= passed
    assert len(listed) == len(set(listed))
    for file in (PROJECT / "hardware").glob("*.yaml"):
        assert re.search(
            r"extends: \{file: shell.yaml, service: shell\}|file: nvidia.yaml|^  shell:", file.read_text(), re.M
        )


ON_TWO = machine(card("eth0", "10.0.0.1/24"))
VALID = {
    "NODES": ("10.0.0.1,10.0.0.2", "10.0.0.1,10.0.0.3"),
    "NNODES": ("2", "2"),  # more or fewer than NODES lists are refused
    "NPROC_PER_NODE": ("1", "2"),
    "MIN_NODES": ("1", "2"),
    "SPARES": ("0", "1"),
    "RUN_NAME": ("a", "b"),
    "HARDWARE": ("cpu", "cpu"),
    "NODE_RANK": ("0", "0"),
    "MASTER_ADDR": ("10.0.0.1", "10.0.0.1"),
    "BACKEND": ("gloo", "auto"),  # which is gloo here
}


@pytest.mark.parametrize(
    "setting", [each for each in TABLE if each.scope not in ("compose", "desk")], ids=lambda each: each.name
)
def test_the_nodes_compare_exactly_what_the_settings_of_the_cluster_come_to(setting: Setting) -> None:
    def equal(text: str) -> dict[str, str]:
        environ = {"NODES": "10.0.0.1,10.0.0.2", "NPROC_PER_NODE": "1", setting.name: text}
        return dict(planned(ON_TWO, **environ).equal)

    one, two = VALID.get(setting.name, WORDS.get(setting.name, ("41", "42")))
    differing = {name for name in equal(one).keys() | equal(two).keys() if equal(one).get(name) != equal(two).get(name)}
    same = setting.scope != "cluster" or setting.name in ("NNODES", "BACKEND")
    # Arguments are compared as part of the command, and a port also moves the one next to it.
    expected = {"TRAIN_ARGS": {"TRAIN_SCRIPT"}, "MASTER_PORT": {"MASTER_PORT", "CONTROL_PORT"}}
    assert differing == (set() if same else expected.get(setting.name, {setting.name}))


def with_names(stack: str, names: Iterable[str]) -> str:
    """compose.yaml with a line for each name at its place in the alphabet."""
    for name in names:
        block = stack.split("    environment:\n")[1]
        after = next(each for each in re.findall(r"^ {6}([A-Z][A-Z0-9_]+):", block, re.MULTILINE) if each > name)
        stack = stack.replace(f"\n      {after}:", f"\n      {name}:\n      {after}:")
    return stack


def test_compose_passes_every_setting_on_and_reads_those_of_its_own() -> None:
    stack = (PROJECT / "compose.yaml").read_text(encoding="utf-8")
    if "TORCHRUN_COMPOSE_UPDATE" in os.environ:
        handed = {setting.name for setting in TABLE if setting.scope not in ("compose", "desk")}
        stack = with_names(stack, sorted(name for name in handed if f"\n      {name}:" not in stack))
        (PROJECT / "compose.yaml").write_text(stack, encoding="utf-8")
    fragments = "".join(file.read_text(encoding="utf-8") for file in (PROJECT / "hardware").glob("*.yaml"))
    block = stack.split("    environment:\n")[1].split("\n\n")[0]
    passed = re.findall(r"^ {6}([A-Z][A-Z0-9_]+):", block, re.MULTILINE)
    inside = {setting.name for setting in TABLE if setting.scope not in ("compose", "desk")}
    assert set(passed) == inside | {"ENV_FILE", "RUNS", "STACK_DIR", "WORKSPACE"}
    # BASE_IMAGE is a build argument without a value, which Compose fills in the same way.
    read_by_compose = set(re.findall(r"\$\{([A-Z][A-Z0-9_]+)", stack + fragments)) | {"BASE_IMAGE"}
    own = {setting.name for setting in TABLE if setting.scope == "compose"}
    assert own <= read_by_compose
    assert read_by_compose - own <= inside | {"PWD"}
