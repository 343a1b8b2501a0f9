"""What a push sends, and what the host does with it: its own script, run here by sh."""

import subprocess
from pathlib import Path

import pytest

from app.fleet.hosts import Desk
from app.fleet.image import Held, answer, choose
from app.fleet.push import LIST, NOT_OURS, PARTS, RECEIVE, File, filled, local_files, pack, parse_listing
from app.fleet.remote import HERE
from tests.unit.test_desk_hosts import desk


def checkout(tmp_path: Path, lines: str = "NODES=a,b") -> Desk:
    made = desk(tmp_path, lines)
    (tmp_path / "hardware/cpu.yaml").write_text("x: 1\n")
    (tmp_path / "workspace/my script.py").write_text("print(1)\n")
    (tmp_path / "workspace/__pycache__").mkdir()
    (tmp_path / "workspace/__pycache__/my.pyc").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/big").touch()
    return made


class Node:
    """The folder of a host, and the scripts that ssh would run there."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "there"
        home.mkdir()

    def sh(self, script: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["sh", "-c", script], cwd=self.home, input=stdin, capture_output=True)

    def list(self) -> tuple[dict[str, tuple[int, int, int]], set[str]]:
        done = self.sh(filled(LIST, FOLDER="there", PARTS=" ".join([".env", "workspace", *PARTS])))
        assert done.returncode == 0, done.stderr
        return parse_listing(done.stdout.decode())

    def archive(self, made: Desk) -> bytes:
        there, before = self.list()
        files = dict(local_files(made))
        changed = {name: file for name, file in files.items() if there.get(name) != file.stated}
        return pack(self.home / "tar", changed, sorted(before - files.keys()), sorted(files), "t0").read_bytes()

    def receive(self, archive: bytes) -> int:
        own = subprocess.run(["id", "-u"], capture_output=True, text=True).stdout.strip()
        return self.sh(filled(RECEIVE, FOLDER="there", TOKEN="t0", RUN_AS=own), archive).returncode  # noqa: S106


def names(node: Node) -> set[str]:
    files = {str(file.relative_to(node.folder)) for file in node.folder.rglob("*") if file.is_file()}
    return {name for name in files if not name.startswith(".desk/")}


def test_a_push_brings_what_belongs_on_a_host_and_the_next_one_only_what_changed(tmp_path: Path) -> None:
    (tmp_path / "desk").mkdir()
    made, node = checkout(tmp_path / "desk"), Node(tmp_path / "node")
    assert node.receive(node.archive(made)) == 0
    assert names(node) == {".env", "compose.yaml", "hardware/cpu.yaml", "workspace/my script.py"}
    there, _ = node.list()
    assert all(there[name] == file.stated for name, file in local_files(made))
    (made.project / "workspace/my script.py").write_text("print(2, 3)\n")
    (made.project / "hardware/cpu.yaml").unlink()
    (node.folder / "workspace/of-the-job.txt").touch()
    assert node.receive(node.archive(made)) == 0
    assert (node.folder / "workspace/my script.py").read_text() == "print(2, 3)\n"
    # What the job wrote there stays; what was pushed and is gone here goes.
    assert names(node) == {".env", "compose.yaml", "workspace/my script.py", "workspace/of-the-job.txt"}


def test_a_push_that_is_cut_off_anywhere_leaves_the_old_one_whole(tmp_path: Path) -> None:
    (tmp_path / "desk").mkdir()
    made, node = checkout(tmp_path / "desk"), Node(tmp_path / "node")
    assert node.receive(node.archive(made)) == 0
    for name in (".env", "workspace/my script.py"):
        (made.project / name).write_text("NODES=c,d\n" * 3)
    archive = node.archive(made)
    old = {name: (node.folder / name).read_text() for name in names(node)}
    for cut in (0, 1, len(archive) // 2, len(archive) - 20, len(archive) - 1):
        assert node.receive(archive[:cut]) != 0
        assert {name: (node.folder / name).read_text() for name in names(node)} == old
        assert not list((node.folder / ".desk").glob("new.*"))
    assert node.receive(archive) == 0
    assert (node.folder / ".env").read_text() == "NODES=c,d\n" * 3


def test_a_host_that_died_while_it_moved_files_ends_it_at_the_next_push(tmp_path: Path) -> None:
    (tmp_path / "desk").mkdir()
    made, node = checkout(tmp_path / "desk"), Node(tmp_path / "node")
    assert node.receive(node.archive(made)) == 0
    commit = node.folder / ".desk/commit"
    (commit / "files/workspace/new").mkdir(parents=True)
    (commit / "files/workspace/new/x.py").write_text("new")
    (commit / "gone").write_text("hardware/cpu.yaml")
    (commit / "pushed").write_text("workspace/new/x.py")
    _, before = node.list()
    assert before == {"workspace/new/x.py"}
    assert names(node) == {".env", "compose.yaml", "workspace/my script.py", "workspace/new/x.py"}
    assert not commit.exists()


def test_a_folder_that_is_the_users_own_is_left_alone(tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    node.folder.mkdir()
    (node.folder / "thesis.tex").touch()
    assert node.sh(filled(LIST, FOLDER="there", PARTS=".env")).returncode == NOT_OURS
    assert [file.name for file in node.folder.iterdir()] == ["thesis.tex"]


def test_scripts_and_the_token_are_sent_from_where_the_settings_say(tmp_path: Path) -> None:
    (tmp_path / "desk").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.py").touch()
    (tmp_path / "token").write_text("secret")
    made = checkout(tmp_path / "desk", "NODES=a,b\nWORKSPACE=../mine\nCLUSTER_TOKEN_FILE=../token")
    assert {"workspace/train.py", "secrets/cluster_token"} <= dict(local_files(made)).keys()


@pytest.mark.parametrize("text", ["\n", "644 3 17 a b c\n\na\0b\0"])
def test_names_of_a_host_may_hold_blanks(text: str) -> None:
    there, before = parse_listing(text)
    assert (there, before) in [({}, set()), ({"a b c": (0o644, 3, 17)}, {"a", "b"})]


def test_a_link_is_always_sent_again(tmp_path: Path) -> None:
    file = File(source=tmp_path, mode=0o777, size=-1, time=0)
    assert file.stated[1] < 0


ARM, AMD = Held(arch="arm64"), Held(arch="amd64")


def test_the_image_is_made_on_the_desk_only_if_it_is_of_the_hosts_kind(tmp_path: Path) -> None:
    first, second = desk(tmp_path, "NODES=a,b").hosts
    has = Held(arch="amd64", content="amd64 [] x")
    assert choose("auto", {first: AMD, second: AMD, HERE: AMD}) == HERE
    assert choose("auto", {first: AMD, second: AMD, HERE: ARM}) == first
    assert choose("auto", {first: AMD, second: has, HERE: Held()}) == second
    assert choose("b", {first: AMD, second: AMD, HERE: AMD}) == second


def test_only_the_layers_above_those_that_a_host_has_are_missing() -> None:
    held = answer('amd64\n\n["1","2"]\n["1","9","3"]\n')
    assert (held.arch, held.content) == ("amd64", "")
    assert [held.lacks(layers) for layers in (["1", "2", "3"], ["1", "2"], ["7", "2"], ["1", "9", "3", "4"])] == [
        1,
        0,
        2,
        1,
    ]
    assert answer('amd64\namd64 ["sha256:5"] null rev1\n["sha256:5"]\n').layers == ("sha256:5",)
