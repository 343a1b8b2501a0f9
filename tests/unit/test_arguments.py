"""The first word after `entrypoint.py`: a command, a script, or a mistake that is told."""

from pathlib import Path

import pytest

import entrypoint
from app.cli.arguments import command_of
from app.config.errors import UserError

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
        (
            "--version",
            "--version is no option. `--help` lists the commands; `run --version ...` hands it to the script",
        ),
        ("-x", "-x is no option."),
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


@pytest.mark.parametrize(
    ("arguments", "text"), [(["--help"], "The front door"), (["explain", "--help"], "explain [--js")]
)
def test_help_is_printed_and_nothing_decided(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entrypoint.main(arguments) == 0
    assert text in capsys.readouterr().out
