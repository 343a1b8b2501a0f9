"""What a failed job leaves: read, told in fifteen lines, packed without secrets."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from app.launch.bundle import REMOVED, bundle, main, redact, secrets_of
from app.launch.errors import UserError
from app.launch.plan import Draft, Plan
from app.launch.report import Report, Round, make_report, read_counters, stored, summary, write_report
from tests.machines.facts import drafted, settings_of

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
    write(run_dir / "logs" / f"{run_id}.error.json", json.dumps(content))


def test_the_last_error_the_ends_of_the_logs_and_what_grew_are_in_the_report(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    error_file(plan.run_dir, "default-1-abc", "ValueError: first", 1000)
    error_file(plan.run_dir, "default-2-abc", "ValueError: bad batch", 1060)
    error_file(plan.run_dir, "default-9-old", "ValueError: of another start", 10)
    logs = plan.run_dir / "logs/default-2-abc_x/attempt_0"
    write(logs / "1/stderr.log", "\n".join(f"line {number}" for number in range(100)))
    write(logs / "0/stdout.log", "hello\n")
    before = {name: count - 2 for name, count in read_counters().items()}
    report = make_report(plan, 5, "node 1 - rank 3 failed", {**before, "gone0 rx_errors": 4}, 990.0)
    assert [(each.run_id, each.exitcode) for each in report.rounds] == [("default-1-abc", 3), ("default-2-abc", 3)]
    assert report.logs["local rank 1 stderr"][-1] == "line 99"
    assert len(report.logs["local rank 1 stderr"]) == 40
    assert report.logs["local rank 0 stdout"] == ("hello",)
    assert report.counters["kills for memory"] == 2
    assert "gone0 rx_errors" not in report.counters


def test_a_known_error_in_a_workers_log_is_named_with_its_cure(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    text = "RuntimeError: CUDA error: system not yet initialized"
    write(plan.run_dir / "logs/default-1-abc_x/attempt_0/0/stderr.log", text)
    report = make_report(plan, 5, "verdict", {}, 0.0)
    assert report.symptom
    assert report.cure
    assert "system not yet initialized" in report.line


def test_without_any_log_the_report_says_that_the_cause_is_elsewhere(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    report = make_report(plan, 6, "node 2 was lost", {}, 0.0)
    assert (report.rounds, dict(report.logs), report.symptom) == ((), {}, "")
    assert "the cause is on another node or outside Python" in summary(report, FOLDER)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"message": "text"}', '{"message": {"message": 1}}', "null"])
def test_an_error_file_that_is_none_is_left_out(content: str, tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    write(plan.run_dir / "logs/default-1-abc.error.json", content)
    assert make_report(plan, 5, "verdict", {}, 0.0).rounds == ()


FULL = Report(
    node_rank=1,
    nodes=2,
    address="10.0.0.2",
    run_name="default",
    time=1_800_000_000.0,
    code=5,
    verdict="\n".join(f"verdict line {number}" for number in range(30)),
    rounds=tuple(
        Round(run_id=f"r{number}", message="ValueError: bad\nmore", traceback=TRACE, exitcode=1, time=number)
        for number in range(9)
    ),
    logs={},
    counters={f"eth{number} rx_errors": number + 1 for number in range(50)},
    symptom="gpu-lost",
    line="x" * 5000,
    cause="y" * 5000,
    cure="z" * 5000,
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


def test_both_files_are_written_and_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    write_report(plan, FULL)
    folder = write_report(plan, replace(FULL, code=6))
    assert sorted(file.name for file in folder.iterdir()) == ["report.json", "report.txt"]
    assert json.loads((folder / "report.json").read_text())["code"] == 6
    assert stored(plan.run_dir) == [folder]


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


SECRETS = [
    "https://user:hunter22@host/repo",
    "Authorization: Bearer abcdefghijklmnop",
    "login with hf_abcdefghijklmnopqrst",
    "AWS_SECRET_ACCESS_KEY=abcd/efgh+ijkl",
    '"api_key": "0123456789"',
    "WANDB_API_KEY: 0123456789abcdef",
    "--token=abcdef123456",
]


@pytest.mark.parametrize("line", SECRETS)
def test_what_looks_like_a_secret_is_removed_wherever_it_stands(line: str) -> None:
    clean = redact(f"before {line} after", ())
    assert REMOVED in clean
    for secret in ("hunter22", "abcdefghijklmnop", "abcd/efgh", "0123456789", "abcdef123456"):
        assert secret not in clean
    assert clean.startswith("before ")
    assert clean.endswith(" after")


@pytest.mark.parametrize(
    "line", ["loss 3.21, 512 tokens", "tokenizer: gpt2", "NODES=10.0.0.1,10.0.0.2", "key 5: value"]
)
def test_ordinary_lines_are_left_as_they_are(line: str) -> None:
    assert redact(line, ()) == line


def test_values_of_variables_with_a_telling_name_and_the_token_are_secrets(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123\n")
    _, found = planned(tmp_path)
    settings = settings_of(
        {"CLUSTER_TOKEN_FILE": str(token), "WANDB_API_KEY": "wandb-value", "DB_PASSWORD": "short", "LANG": "C.UTF-8"}
    )
    assert set(secrets_of(settings, found)) == {"0123456789abcdef0123", "wandb-value"}


def test_the_bundle_holds_report_logs_and_plan_and_none_of_the_secrets(tmp_path: Path) -> None:
    plan, found = planned(tmp_path)
    write_report(plan, FULL)
    error_file(plan.run_dir, "default-1-abc", "ValueError: with wandb-value inside")
    write(plan.run_dir / "logs/default-1-abc_x/attempt_0/0/stderr.log", "key wandb-value\n")
    write(plan.run_dir / "checkpoints/step.pt", "weights")
    with tarfile.open(fileobj=io.BytesIO(bundle(plan.run_dir, found, ["wandb-value"]))) as archive:
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


def test_without_a_report_the_command_says_so_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no report"):
        main([], {"RUN_DIR": str(tmp_path)}, None)
