"""Which hosts the desk works on, and what it says when one of them cannot be used."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from app.config.errors import UserError
from app.fleet.command import COMMANDS, main
from app.fleet.hosts import Desk, Host, read_desk
from app.fleet.remote import explain_failure, lines_of


def desk(tmp_path: Path, lines: str) -> Desk:
    (tmp_path / "hardware").mkdir(exist_ok=True)
    (tmp_path / "compose.yaml").touch()
    (tmp_path / ".env").write_text(lines)
    inner = tmp_path / "workspace"
    inner.mkdir(exist_ok=True)
    return read_desk(inner, {})


def test_the_hosts_are_those_of_nodes_unless_ssh_has_other_names(tmp_path: Path) -> None:
    plain = desk(tmp_path, "NODES=10.0.0.1,10.0.0.2")
    assert [each.name for each in plain.hosts] == ["10.0.0.1", "10.0.0.2"]
    named = desk(tmp_path, "NODES=10.0.0.1,10.0.0.2\nHOSTS=gpu-a gpu-b")
    assert [(each.name, each.rank) for each in named.hosts] == [("gpu-a", 0), ("gpu-b", 1)]
    assert [each.name for each in named.only(["gpu-b"]).hosts] == ["gpu-b"]
    assert [each.name for each in named.only(["0"]).hosts] == ["gpu-a"]
    with pytest.raises(UserError):
        named.only(["gpu-c"])


@pytest.mark.parametrize(
    "lines", ["", "NODES=a,b\nHOSTS=a", "HOSTS=a,a", "HOSTS=-oProxyCommand=x,b", "HOSTS=a;b$(x),c", "MASTER_PORT=x"]
)
def test_settings_that_name_no_usable_hosts_are_refused(tmp_path: Path, lines: str) -> None:
    with pytest.raises(UserError):
        desk(tmp_path, lines)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_desk(tmp_path, {})


CHANGED = "@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed."


@pytest.mark.parametrize(
    ("code", "said", "id"),
    [
        (255, "ssh: connect to host a port 22: Connection timed out", "ssh.host-down"),
        (255, "ssh: connect to host a port 22: No route to host", "ssh.host-down"),
        (255, "ssh: connect to host a port 22: Connection refused", "ssh.no-server"),
        (255, "ssh: Could not resolve hostname a: Name or service not known", "ssh.unknown-name"),
        (255, "me@a: Permission denied (publickey,password).", "ssh.key-refused"),
        (255, CHANGED, "ssh.host-key-changed"),
        (255, "Host key verification failed.", "ssh.host-key-unknown"),
        (255, "kex_exchange_identification: read: Connection reset by peer", "ssh.failed"),
        (127, "sh: 1: docker: not found", "docker.missing"),
        (1, "docker: 'compose' is not a docker command.\nSee 'docker --help'", "compose.missing"),
        (1, "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "docker.not-running"),
        (1, "permission denied while trying to connect to the Docker daemon socket at unix", "docker.permission"),
        (1, "tar: app: Cannot write: No space left on device", "disk.full"),
        # A command's own words are not ssh's.
        (1, "curl: (7) Connection refused", "host.failed"),
    ],
)
def test_each_failure_of_a_host_is_one_sentence_with_its_name(code: int, said: str, id: str) -> None:
    found = explain_failure(Host(name="gpu-b", rank=1), code, said)
    assert found.id == id
    assert "gpu-b" in found.message
    assert "\n" not in found.message


def test_what_a_host_prints_cannot_act_on_the_terminal() -> None:
    assert lines_of(b"a\x1b[2Jb\r\nc\xff") == "a\\x1b[2Jb\nc\ufffd"


def test_the_package_that_is_installed_holds_all_that_the_desk_imports() -> None:
    project = Path(__file__).parents[2]
    settings = tomllib.loads((project / "pyproject.toml").read_text())
    packages = settings["tool"]["setuptools"]["packages"]
    files = [file for room in ("fleet", "config") for file in (project / "app" / room).glob("*.py")]
    imported = {
        room for file in files for room in re.findall(r"^\s*(?:from|import) (app\.\w+)", file.read_text(), re.M)
    }
    assert imported <= set(packages)
    module, _, function = settings["project"]["scripts"]["torchrun-compose"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_command_of_the_desk_has_its_help(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"], {}, tmp_path)
        assert f"{name} " in capsys.readouterr().out


def test_a_command_or_option_that_does_not_exist_is_named(tmp_path: Path) -> None:
    for arguments, named in ((["chekc"], "chekc"), ([], "no command"), (["--of", "x", "check"], "--of")):
        with pytest.raises(UserError, match=named):
            main(arguments, {}, tmp_path)
