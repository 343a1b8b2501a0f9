"""What a failed job leaves: read, told in fifteen lines, packed without secrets."""

import io
import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from app.cli.report import bundle, main, reports
from app.config.errors import UserError
from app.config.exitcodes import ExitCode
from app.config.redaction import REMOVED
from app.engine.command import command_line, environment
from app.engine.outcome import Failure, Outcome
from app.gang.verdict import Verdict
from app.plan import Draft, Plan
from app.report.history import RoundRecord, keep_round
from app.report.node_report import (
    READ_BYTES,
    NodeReport,
    forget_report,
    make_report,
    read_counters,
    stored,
    summary,
    write_report,
)
from app.supervise.node import tell_report
from tests.machines.facts import drafted

TRACE = 'Traceback (most recent call last):\n  File "/workspace/my.py", line 7, in step\nValueError: bad batch\n'
FOLDER = Path("/runs/default/report/node1")


def write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


def planned(tmp_path: Path) -> tuple[Plan, Draft]:
    found = drafted("laptop", tmp_path / "machine", RUN_DIR=str(tmp_path / "run"))
    assert found.plan
    return found.plan, found


def error_file(run_dir: Path, run_id: str, message: str, at: float = 1000.0) -> None:
    extra = {"py_callstack": TRACE, "timestamp": str(int(at))}
    content = {"message": {"message": message, "extraInfo": extra, "errorCode": 3}}
    write(run_dir / "logs/node0" / f"{run_id}.error.json", json.dumps(content))


def test_the_last_error_the_ends_of_the_logs_and_what_grew_are_in_the_report(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    error_file(plan.script.run_dir, "default-1-abc", "ValueError: first", 1000)
    error_file(plan.script.run_dir, "default-2-abc", "ValueError: bad batch", 1060)
    error_file(plan.script.run_dir, "default-9-old", "ValueError: of another start", 10)
    logs = plan.script.run_dir / "logs/node0/default-2-abc_x/attempt_0"
    write(logs / "1/stderr.log", "\n".join(f"line {number}" for number in range(100)))
    write(logs / "0/stdout.log", "hello\n")
    before = {name: count - 2 for name, count in read_counters().items()}
    report = make_report(plan, 5, "node 1 - rank 3 failed", {**before, "gone0 rx_errors": 4}, 990.0)
    assert [(each.run_id, each.code) for each in report.rounds] == [("default-1-abc", 3), ("default-2-abc", 3)]
    assert report.logs["local rank 1 stderr"][-1] == "line 99"
    assert len(report.logs["local rank 1 stderr"]) == 40
    assert report.logs["local rank 0 stdout"] == ("hello",)
    assert report.counters["kills for memory"] == 2
    assert "gone0 rx_errors" not in report.counters


def test_a_known_error_in_a_workers_log_is_named_with_its_fix(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    text = "RuntimeError: CUDA error: system not yet initialized"
    write(plan.script.run_dir / "logs/node0/default-1-abc_x/attempt_0/0/stderr.log", text)
    report = make_report(plan, 5, "verdict", {}, 0.0)
    assert report.known_error
    assert report.fix
    assert "system not yet initialized" in report.line


def test_without_any_log_the_report_says_that_the_cause_is_elsewhere(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    report = make_report(plan, 6, "node 2 was lost", {}, 0.0)
    assert (report.rounds, dict(report.logs), report.known_error) == ((), {}, "")
    assert "first error here: none, no worker of this node failed by itself" in summary(report, FOLDER)


def killed(rank: int, local_rank: int, exitcode: int = -9, text: str = "") -> Failure:
    return Failure(rank=rank, local_rank=local_rank, exitcode=exitcode, text=text, time=1000.0)


def test_how_each_round_ended_is_kept_and_a_signal_is_the_first_error(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    plan.log_dir.mkdir(parents=True)
    keep_round(plan, "default-1-abc", Outcome(code=1, failures=(killed(1, 1), killed(0, 0, -15))))
    keep_round(plan, "default-2-abc", Outcome(code=1, failures=(killed(1, 1, 7), killed(0, 0, -15))))
    report = make_report(plan, 5, "verdict", {}, 0.0)
    assert [[failure.exitcode for failure in each.failures] for each in report.rounds] == [[-9, -15], [7, -15]]
    assert "first error here: rank 1 ended with exit code 7, without an exception" in summary(report, FOLDER)
    assert "failed rounds here: 2" in summary(report, FOLDER)
    first = replace(report, rounds=report.rounds[:1])
    assert "first error here: rank 1 was ended by SIGKILL" in summary(first, FOLDER)
    assert json.loads((write_report(plan, report) / "report.json").read_text())["rounds"][0]["failures"][0]["rank"] == 1


def test_a_round_in_which_this_node_was_told_to_end_is_no_failure_of_its_own(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    plan.log_dir.mkdir(parents=True)
    keep_round(plan, "default-1-abc", Outcome(code=1, failures=(killed(0, 0, -15),), halted=True))
    report = make_report(plan, 5, "node 1 - rank 3 failed with ValueError: x (exit code 1)", {}, 0.0)
    assert "first error here: none, no worker of this node failed by itself" in summary(report, FOLDER)
    assert report.known_error == ""


@pytest.mark.parametrize("halted", [False, True])
def test_an_error_that_a_script_only_printed_is_the_first_error_of_its_node(tmp_path: Path, *, halted: bool) -> None:
    plan, _ = planned(tmp_path)
    plan.log_dir.mkdir(parents=True)
    keep_round(plan, "default-1-abc", Outcome(code=1, failures=(killed(1, 1, 1),), halted=halted))
    logs = plan.log_dir / "default-1-abc_x/attempt_0"
    write(logs / "1/stderr.log", "Error executing job\nValueError: bad batch\nSet HYDRA_FULL_ERROR=1")
    write(logs / "0/stderr.log", "ValueError: of a healthy rank")
    report = make_report(plan, 5, "verdict", {}, 0.0)
    assert "first error here: ValueError: bad batch" in summary(report, FOLDER)
    assert report.rounds[-1].failed


def test_what_a_rank_printed_whose_peer_had_gone_is_no_error_of_its_node(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    plan.log_dir.mkdir(parents=True)
    keep_round(plan, "default-1-abc", Outcome(code=1, failures=(killed(1, 1, 1),), halted=True))
    logs = plan.log_dir / "default-1-abc_x/attempt_0"
    write(logs / "1/stderr.log", "RuntimeError: [pair.cc:553] Connection closed by peer [10.0.0.1]:44775")
    report = make_report(plan, 5, "verdict", {}, 0.0)
    assert "first error here: none, no worker of this node failed by itself" in summary(report, FOLDER)


def test_a_torn_line_of_the_history_is_left_out(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    plan.log_dir.mkdir(parents=True)
    keep_round(plan, "default-1-abc", Outcome(code=1))
    with (plan.log_dir / "rounds.jsonl").open("a") as file:
        file.write('{"run_id": "default-2-abc", "code"\n[]\n{"run_id": 5}\n')
    assert [each.run_id for each in make_report(plan, 5, "verdict", {}, 0.0).rounds] == ["default-1-abc"]


def test_the_exception_is_that_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    closed = "RuntimeError: [pair.cc:553] Connection closed by peer [10.0.0.2]:39558"
    error_file(plan.script.run_dir, "default-1-abc", closed)
    content = {"message": {"message": "ValueError: bad batch", "extraInfo": {"py_callstack": TRACE, "timestamp": "1"}}}
    write(plan.log_dir / "default-1-abc_x/attempt_0/1/error.json", json.dumps(content))
    failures = (killed(3, 1, 1, "ValueError: bad batch"), killed(2, 0, 1, closed))
    keep_round(plan, "default-1-abc", Outcome(code=1, failures=failures))
    report = make_report(plan, 5, "verdict", {}, 0.0)
    assert [(each.message, each.traceback) for each in report.rounds] == [("ValueError: bad batch", TRACE)]


def test_a_worker_that_was_killed_is_not_given_the_exception_of_a_neighbour(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    closed = "RuntimeError: [pair.cc:553] Connection closed by peer [10.0.0.2]:39558"
    error_file(plan.script.run_dir, "default-1-abc", closed)
    keep_round(plan, "default-1-abc", Outcome(code=1, failures=(killed(3, 1), killed(2, 0, 1, closed))))
    report = make_report(plan, 5, "verdict", {}, 0.0)
    assert "first error here: rank 3 was ended by SIGKILL" in summary(report, FOLDER)
    assert report.known_error == "killed-9"


def test_nodes_that_share_a_folder_keep_their_logs_and_errors_apart(tmp_path: Path) -> None:
    first, _ = planned(tmp_path)
    second = replace(first, nodes=replace(first.nodes, rank=1))
    places = {"nnodes": 2, "master_addr": "10.0.0.1", "master_port": 29400, "run_id": "default-1-abc"}
    seen = []
    for plan, text in ((first, "first"), (second, "second")):
        words = command_line(plan, node_rank=plan.nodes.rank, **places)  # type: ignore[arg-type]  # one dict of all kinds
        folder = Path(next(word.removeprefix("--log-dir=") for word in words if word.startswith("--log-dir=")))
        told = environment(plan, {}, run_id="default-1-abc")["TORCHELASTIC_ERROR_FILE"]
        seen += [folder, Path(told).parent]
        write(folder / "default-1-abc_x/attempt_0/0/stderr.log", f"log of the {text}")
        content = {"message": {"message": f"ValueError: {text}", "extraInfo": {}}}
        write(Path(told), json.dumps(content))
        keep_round(
            plan, "default-1-abc", Outcome(code=1, failures=(killed(plan.nodes.rank, 0, 1, f"ValueError: {text}"),))
        )
    assert seen[0] == seen[1] != seen[2] == seen[3]
    for plan, text in ((first, "first"), (second, "second")):
        report = make_report(plan, 5, "verdict", {}, 0.0)
        assert [each.message for each in report.rounds] == [f"ValueError: {text}"]
        assert dict(report.logs) == {"local rank 0 stderr": (f"log of the {text}",)}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"message": "text"}', '{"message": {"message": 1}}', "null"])
def test_an_error_file_that_is_none_is_left_out(content: str, tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    write(plan.script.run_dir / "logs/node0/default-1-abc.error.json", content)
    assert make_report(plan, 5, "verdict", {}, 0.0).rounds == ()


FULL = NodeReport(
    node_rank=1,
    nodes=2,
    address="10.0.0.2",
    run_name="default",
    time=1_800_000_000.0,
    code=5,
    verdict="\n".join(f"verdict line {number}" for number in range(30)),
    rounds=tuple(
        RoundRecord(run_id=f"r{number}", message="ValueError: bad\nmore", traceback=TRACE, code=1, time=number)
        for number in range(9)
    ),
    logs={},
    counters={f"eth{number} rx_errors": number + 1 for number in range(50)},
    counters_before={},
    counters_after={},
    xids=("0000:18:00 Xid 79",) * 20,
    left_out=("transformers: ModuleNotFoundError: No module named 'transformers'",) * 3,
    known_error="gpu-lost",
    names_cause=True,
    line="x" * 5000,
    cause="y" * 5000,
    fix="z" * 5000,
    restarts=({"detection": 0.05, "stop": 0.2},) * 9,
    stalls=("rank0.json", "rank1.json"),
    flight_records=("a", "b"),
    decisions=(),
)


def test_the_summary_has_at_most_fifteen_lines_however_much_went_wrong() -> None:
    lines = summary(FULL, FOLDER).splitlines()
    assert len(lines) <= 15
    assert max(len(line) for line in lines) <= 300
    assert "exit code: 5 (TRAINING)" in lines
    assert "first error here: ValueError: bad" in lines
    assert 'at: File "/workspace/my.py", line 7, in step' in lines
    assert lines[-1] == f"more: {FOLDER}"


TORCH_FRAME = '  File "/opt/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 9, in _call_impl\n'


@pytest.mark.parametrize(
    ("trace", "place"),
    [
        (TRACE, 'File "/workspace/my.py", line 7, in step'),
        (TRACE.replace("ValueError", TORCH_FRAME + "ValueError"), 'File "/workspace/my.py", line 7, in step'),
        (TORCH_FRAME, TORCH_FRAME.strip()),
    ],
)
def test_the_place_of_an_error_is_the_scripts_own_line_if_there_is_one(trace: str, place: str) -> None:
    one = replace(FULL.rounds[0], traceback=trace)
    assert f"at: {place}" in summary(replace(FULL, rounds=(one,)), FOLDER).splitlines()


def test_a_report_with_file_names_that_are_no_text_is_written(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    folder = write_report(plan, replace(FULL, verdict="cannot read '\udcff.png'"))
    assert "cannot read '\\udcff.png'" in (folder / "report.txt").read_text()


def test_a_report_that_fails_is_told_and_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RecursionError("a bug")

    plan, _ = planned(tmp_path)
    verdict = Verdict(code=ExitCode.TRAINING, text="node 1 - rank 3 failed")
    monkeypatch.setattr("app.supervise.node.make_report", fail)
    tell_report(plan, verdict, {}, 0.0)
    assert capsys.readouterr().err == "torchrun-compose: no report: RecursionError: a bug\n"


def test_the_cause_and_the_fix_of_a_known_error_are_told_with_the_verdict_and_a_consequence_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = planned(tmp_path)
    peer, disk = "RuntimeError: Connection closed by peer [10.0.0.2]", "OSError: [Errno 28] No space left on device"
    for message, words in ((disk, ["cause:", "fix:", "report"]), (peer, ["report"])):
        error_file(plan.script.run_dir, "default-1-abc", message)
        tell_report(plan, Verdict(code=ExitCode.TRAINING, text="verdict"), {}, 0.0)
        lines = capsys.readouterr().err.splitlines()
        assert [line.split()[1] for line in lines] == words


def test_a_job_that_ends_well_removes_the_report_of_an_earlier_one_and_keeps_stacks(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    forget_report(plan)
    folder = write_report(plan, FULL)
    write(folder / "stalls/rank0.json", "{}")
    forget_report(plan)
    assert [file.name for file in folder.iterdir()] == ["stalls"]
    other = replace(plan, nodes=replace(plan.nodes, rank=1), script=replace(plan.script, run_dir=tmp_path / "other"))
    write_report(other, FULL)
    forget_report(other)
    assert not (other.script.run_dir / "report").exists()


def test_the_command_says_that_a_job_began_after_the_reported_one(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    write(plan.log_dir / "default-1-abc_x/attempt_0/0/stderr.log", "")
    report = write_report(plan, FULL) / "report.txt"
    folder = plan.log_dir / "default-1-abc_x/attempt_0"
    os.utime(folder, (1_800_000_000, 1_800_000_000))
    os.utime(report, (1_800_000_100, 1_800_000_100))
    assert "since then" not in reports(plan.script.run_dir)
    os.utime(report, (1_799_999_000, 1_799_999_000))
    assert (
        reports(plan.script.run_dir)
        .splitlines()[-1]
        .startswith("since then: a round began here at 2027-01-15 08:00:00 UTC")
    )


def test_only_folders_of_nodes_are_reports_in_the_order_of_their_ranks(tmp_path: Path) -> None:
    for name in ("node10", "node2", "node1.old", "node", "nodes"):
        write(tmp_path / "report" / name / "report.txt", name)
    assert [folder.name for folder in stored(tmp_path)] == ["node2", "node10"]


def test_both_files_are_written_and_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    write_report(plan, FULL)
    folder = write_report(plan, replace(FULL, code=6))
    assert sorted(file.name for file in folder.iterdir()) == ["report.json", "report.txt"]
    assert json.loads((folder / "report.json").read_text())["code"] == 6
    assert stored(plan.script.run_dir) == [folder]


def test_only_the_owner_may_read_a_report_and_no_secret_is_in_it(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    folder = write_report(plan, replace(FULL, verdict="node 0 - rank 0 failed with https://user:hunter22@host/x"))
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600
        assert "hunter22" not in file.read_text()


def test_the_bundle_follows_no_link_to_a_file_or_folder(tmp_path: Path) -> None:
    plan, found = planned(tmp_path)
    write(tmp_path / "outside/report.txt", "of another")
    write(plan.script.run_dir / "report/node0/report.txt", "own")
    (plan.script.run_dir / "report/node0/report.json").symlink_to(tmp_path / "outside/report.txt")
    (plan.script.run_dir / "report/node1").symlink_to(tmp_path / "outside")
    with tarfile.open(fileobj=io.BytesIO(bundle(plan.script.run_dir, found, []))) as archive:
        assert sorted(Path(name).name for name in archive.getnames()) == ["explain.txt", "report.txt"]


def test_stacks_without_a_report_are_no_report(tmp_path: Path) -> None:
    write(tmp_path / "report/node0/stalls/rank0.json", "{}")
    assert stored(tmp_path) == []


def test_counters_are_read_below_a_root_for_cards_ports_and_both_kinds_of_control_groups(tmp_path: Path) -> None:
    write(tmp_path / "sys/class/net/eth0/statistics/rx_errors", "7\n")
    write(tmp_path / "sys/class/infiniband/mlx5_0/ports/1/counters/symbol_error", "9\n")
    write(tmp_path / "proc/self/cgroup", "0::/\n4:memory:/\n")
    write(tmp_path / "sys/fs/cgroup/memory.events", "low 0\noom 3\noom_kill 2\n")
    found = read_counters(tmp_path)
    assert (found["eth0 rx_errors"], found["mlx5_0:1 symbol_error"], found["kills for memory"]) == (7, 9, 2)
    write(tmp_path / "sys/fs/cgroup/memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert read_counters(tmp_path)["kills for memory"] == 5


def test_the_bundle_holds_stacks_and_flight_records_that_can_still_be_read(tmp_path: Path) -> None:
    plan, found = planned(tmp_path)
    write(plan.script.run_dir / "report/node0/stalls/rank0.json", '{"stack": "wandb-value"}')
    record = plan.log_dir / "flight_recorder_rank_0"
    record.parent.mkdir(parents=True)
    record.write_bytes(pickle.dumps({"frames": ["/data/wandb-value/train.py"], "sizes": [[3, 255]]}))
    with tarfile.open(fileobj=io.BytesIO(bundle(plan.script.run_dir, found, ["wandb-value"]))) as archive:
        content = {Path(name).name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]  # all are files
    assert content["rank0.json"].decode() == f'{{"stack": "{REMOVED}"}}'
    assert pickle.loads(content["flight_recorder_rank_0"]) == {  # noqa: S301 - written above
        "frames": ["/data/***********/train.py"],
        "sizes": [[3, 255]],
    }


def test_the_end_of_a_long_log_begins_with_a_whole_line(tmp_path: Path) -> None:
    plan, found = planned(tmp_path)
    write(plan.log_dir / "a_x/attempt_0/0/stdout.log", "first wandb-value\n" + "y" * READ_BYTES + "\nlast\n")
    write(plan.log_dir / "a_x/attempt_0/0/stderr.log", "z" * 2 * READ_BYTES)
    with tarfile.open(fileobj=io.BytesIO(bundle(plan.script.run_dir, found, ["wandb-value"]))) as archive:
        content = {Path(name).name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]  # all are files
    assert content["stdout.log"] == b"last\n"
    assert len(content["stderr.log"]) == READ_BYTES


def test_the_bundle_holds_report_logs_and_plan_and_none_of_the_secrets(tmp_path: Path) -> None:
    plan, found = planned(tmp_path)
    write_report(plan, FULL)
    error_file(plan.script.run_dir, "default-1-abc", "ValueError: with wandb-value inside")
    write(plan.script.run_dir / "logs/node0/default-1-abc_x/attempt_0/0/stderr.log", "key wandb-value\n")
    write(plan.script.run_dir / "checkpoints/step.pt", "weights")
    with tarfile.open(fileobj=io.BytesIO(bundle(plan.script.run_dir, found, ["wandb-value"]))) as archive:
        content = {name: archive.extractfile(name).read().decode() for name in archive.getnames()}  # type: ignore[union-attr]  # all are files
    assert {name.rpartition("/")[2] for name in content} == {
        "report.json",
        "report.txt",
        "default-1-abc.error.json",
        "stderr.log",
        "explain.txt",
    }
    assert not any("wandb-value" in text for text in content.values())
    assert "NODE_RANK=0" in content["run/explain.txt"]


@pytest.mark.parametrize("arguments", [[], ["--bundle", "-"]])
def test_a_folder_that_cannot_be_read_is_named_in_one_sentence(arguments: list[str], tmp_path: Path) -> None:
    # Too long a name is refused to root as well, which may enter every folder.
    with pytest.raises(UserError, match=r"x{300}.* cannot be read: File name too long\."):
        main(arguments, {"RUN_DIR": str(tmp_path / ("x" * 300))}, None)


def test_without_a_report_the_command_says_so_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no report"):
        main([], {"RUN_DIR": str(tmp_path)}, None)
