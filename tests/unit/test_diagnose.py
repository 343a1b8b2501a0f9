"""`diagnose`: any log, from a file or standard input, answered in words or JSON and by the exit code."""

import io
import json
from pathlib import Path

import pytest

from app.cli.diagnose import main
from app.config.errors import UserError

LOG = "step 1\nstep 2\n[rank1]: OSError: [Errno 28] No space left on device\n"


def test_a_known_error_in_a_file_is_named_with_cause_fix_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "log"
    file.write_text(LOG)
    assert main([str(file)]) == 0
    head, cause, fix, more = capsys.readouterr().out.splitlines()
    assert head == "disk-full (line 3): OSError: [Errno 28] No space left on device"
    assert (cause.split()[0], fix.split()[0]) == ("cause:", "fix:")
    assert more == "more: docs/errors/files.md#disk-full"


def test_a_pasted_line_is_read_from_standard_input_and_answered_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LOG.encode())))
    assert main(["-", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["id"], told["layer"], told["line_number"]) == ("disk-full", "files", 3)
    assert told.keys() >= {"cause", "fix", "rank", "line"}


def test_an_unknown_text_is_told_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--json"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"all is well\n\xff")))
        assert main(arguments) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"id": None}


def test_a_file_that_cannot_be_read_is_named_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file or directory"):
        main([str(tmp_path / "none")])
