"""The cluster token's file, and the folder of a user's compiled code: who else may read or write there is told."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from app.config.errors import UserError
from app.gang.token import read_token
from app.plan import Plan
from app.supervise.node import make_home
from tests.machines.facts import drafted

GOOD = "MzNlYjQ0ZGQ5ZTM0YzQ4ZDk0ZGM4"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    found = drafted("laptop", tmp_path / "machine").plan
    assert found
    return replace(found, token_file=tmp_path / "token")


@pytest.mark.parametrize(
    ("token", "mode", "told"),
    [(GOOD, 0o400, ""), (GOOD, 0o440, ""), (GOOD, 0o644, "mode 0644"), ("abcabcabcabcabcabc", 0o400, "easy to guess")],
)
def test_a_token_that_others_can_read_or_guess_is_warned_of(
    plan: Plan, capsys: pytest.CaptureFixture[str], token: str, mode: int, told: str
) -> None:
    assert plan.token_file
    plan.token_file.write_text(f"{token}\n")
    plan.token_file.chmod(mode)
    assert read_token(plan) == token.encode()
    said = capsys.readouterr().err
    assert (told in said) if told else not said
    assert token not in said


def test_a_token_that_is_short_or_gone_ends_the_start(plan: Plan) -> None:
    assert plan.token_file
    with pytest.raises(UserError, match="cannot be read"):
        read_token(plan)
    plan.token_file.write_text("short\n")
    with pytest.raises(UserError, match="make token"):
        read_token(plan)


def test_a_home_is_its_users_alone_and_other_users_can_make_theirs_beside_it(tmp_path: Path) -> None:
    home = tmp_path / ".home/1000"
    make_home(home)
    assert home.stat().st_mode & 0o777 == 0o700
    assert home.parent.stat().st_mode & 0o7777 == 0o1777
    make_home(home)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_home_that_another_user_has_made_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1000").mkdir()
    os.chown(tmp_path / "1000", 65534, 65534)
    make_home(tmp_path / "1000")
    assert "belongs to user 65534" in capsys.readouterr().err
