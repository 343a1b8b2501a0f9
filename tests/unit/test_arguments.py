"""The first word after `entrypoint.py`: a command, a script, or a mistake that is told."""

import json
import re
import tomllib
from pathlib import Path

import pytest

import entrypoint
from app.cli.arguments import command_of
from app.config.errors import UserError
from app.config.options import script_line

COMMANDS = tuple(entrypoint.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "command", "rest"),
    [
        ([], "run", []),
        (["explain", "--json"], "explain", ["--json"]),
        (["train.py", "--lr", "1"], "run", ["train.py", "--lr", "1"]),
        (["-m", "app.train"], "run", ["-m", "app.train"]),
        (["run", "--steps", "9"], "run", ["--steps", "9"]),
        (["./explian", "x"], "run", ["./explian", "x"]),
        (["train", "x"], "run", ["train", "x"]),
    ],
)
def test_the_first_word_is_a_command_or_a_script(arguments: list[str], command: str, rest: list[str]) -> None:
    assert command_of(arguments, COMMANDS) == (command, rest)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("explian", "explian is neither a command nor a script. Did you mean explain?"),
        ("docter", "docter is neither a command nor a script. Did you mean doctor?"),
        ("--steps", "unknown option --steps. `--help` lists the commands; `run -- --steps ...` hands it to the script"),
        ("-x", "unknown option -x."),
    ],
)
def test_a_misspelt_command_or_an_unknown_option_is_refused(word: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        command_of([word], COMMANDS)
    assert refused.value.message.startswith(message)
    assert refused.value.code == 2


def test_a_file_that_is_there_is_a_script_however_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").touch()
    assert command_of(["reports"], COMMANDS) == ("run", ["reports"])


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert entrypoint.main(["--help"]) == 0
    assert set(COMMANDS) <= set(re.findall(r"\w+", capsys.readouterr().out))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_of_a_command_is_printed_and_nothing_is_started(
    command: str, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever would be decided or started begins with the settings.
    monkeypatch.setattr("app.config.settings.merge", lambda *_: pytest.fail("settings were read"))
    with pytest.raises(SystemExit) as ended:
        entrypoint.main([command, option])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {command} ")


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"bench"}))
def test_an_unknown_option_of_a_command_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entrypoint.main([command, "--jsn"]) == 2
    assert capsys.readouterr().err == (
        f"torchrun-compose: unknown option --jsn. `{command} --help` lists the options.\n"
    )


def test_an_unknown_option_of_bench_is_named_before_a_job_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entrypoint.main(["bench", "--secnds", "3"])
    assert ended.value.code == 2
    assert "--secnds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "own", "script"),
    [
        ([], [], []),
        (["--json"], ["--json"], []),
        (["--json", "x.py", "--json"], ["--json"], ["x.py", "--json"]),
        (["-m", "pkg", "--help"], [], ["-m", "pkg", "--help"]),
        (["--", "--steps", "9"], [], ["--steps", "9"]),
        (["x.py", "--", "y"], [], ["x.py", "--", "y"]),
    ],
)
def test_options_before_the_script_are_ours_and_those_after_it_the_scripts(
    arguments: list[str], own: list[str], script: list[str]
) -> None:
    ours, its = script_line(arguments)
    assert (list(ours), list(its)) == (own, script)


def test_explain_leaves_a_scripts_own_json_to_the_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    assert entrypoint.main(["explain", "--json", "mine.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["script"]["command"] == ["mine.py", "--json"]
    assert entrypoint.main(["explain", "mine.py", "--json"]) == 0
    assert "TRAIN_SCRIPT=mine.py --json (command line)" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert entrypoint.main(["--version"]) == 0
    package = tomllib.loads((Path(entrypoint.__file__).parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert capsys.readouterr().out == f"torchrun-compose {package['project']['version']}\n"
