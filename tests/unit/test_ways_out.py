"""Every way out of a node, with secrets of every shape planted where a user has them: none of them leaves."""

import asyncio
import base64
import contextlib
import io
import json
import shlex
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import app.cli.explain
import app.cli.report
import app.cli.run
import entrypoint
from app.config.console import say
from app.config.redaction import redact, settings_secrets
from app.doctor.command import gather_facts, own_row, shown, without_secrets
from app.engine.outcome import Failure, Outcome
from app.engine.warm import Preloaded
from app.plan import Draft, Plan, draft
from app.report.history import keep_left_out, keep_round
from app.report.node_report import make_report, write_report
from app.supervise.node import Node
from tests.machines.facts import host_of, settings_of
from tests.machines.library import MACHINES

SHAPES = (
    "--wandb-token {}",
    "HF_TOKEN={}",
    "https://user:{}@host/x",
    "redis://:{}@host:6379",
    "Authorization: Bearer {}",
    "Cookie: wandb_session={}; Path=/",
    "AccountKey={};EndpointSuffix=x",
    "https://x.blob.core.windows.net/y?sv=1&sig={}",
    "https://hooks.slack.com/services/T0/B0/{}",
    "machine api.wandb.ai login user password {}",
    "-----BEGIN PRIVATE KEY-----{}-----END PRIVATE KEY-----",
)
"""What looks like a secret wherever it stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A node whose user has secrets: in the arguments, in a setting that is wrong, in a token file and variables."""

    folder: Path
    text: str
    environ: Mapping[str, str]
    screen: Callable[[], str]

    @property
    def found(self) -> Draft:
        chosen = settings_of(self.environ)
        return draft(chosen, host_of(chosen, self.folder / "machine"))

    @property
    def plan(self) -> Plan:
        plan = self.found.plan
        assert plan
        return plan

    @property
    def secrets(self) -> tuple[str, ...]:
        return settings_secrets(settings_of(self.environ))


def said(node: Planted) -> str:
    say(redact(node.text, node.secrets))
    return node.screen()


def refused(node: Planted) -> str:
    told = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**node.environ, "NPROC_PER_NODE": node.text}.items():
            patch.setenv(name, value)
        patch.setattr(app.cli.run, "read_final", lambda: None)
        patch.setattr(app.cli.run, "write_final", lambda _code, text: told.append(text))
        patch.setattr("app.supervise.unfit.tell_node_0", lambda _settings, text: told.append(text))
        assert entrypoint.main(["run"]) == 2
    assert len(told) == 2
    return "\n".join([node.screen(), *told])


def started(node: Planted) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.cli.run, "probe_for", lambda chosen: host_of(chosen, node.folder / "machine"))
        patch.setattr("app.supervise.node.supervise", lambda _plan, _process, _secrets: 0)
        patch.setattr(app.cli.run, "preloaded", lambda _plan, _clean: contextlib.nullcontext())
        assert app.cli.run.carry_out(settings_of(node.environ)) == 0
    return node.screen()


def explained(node: Planted, *options: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.cli.explain, "probe_for", lambda chosen: host_of(chosen, node.folder / "machine"))
        wrong = {**node.environ, "NPROC_PER_NODE": node.text}
        for environ in (node.environ, wrong):
            app.cli.explain.main([*options], environ, Path("none"))
    return node.screen()


def examined(node: Planted) -> str:
    facts = gather_facts(settings_of({**node.environ, "NPROC_PER_NODE": node.text}), node.folder / "machine")
    row = own_row(facts)
    return shown([without_secrets(row, facts)], as_json=True) + shown([row], as_json=False)


def failed(node: Planted) -> str:
    """All that a round which failed with this text leaves on the disk for others to read."""
    plan = node.plan
    run_id = "default-1-abc"
    plan.log_dir.mkdir(parents=True, exist_ok=True)
    extra = {"py_callstack": f"Traceback\n{node.text}", "timestamp": "1000"}
    content = {"message": {"message": node.text, "extraInfo": extra, "errorCode": 1}}
    (plan.log_dir / f"{run_id}.error.json").write_text(json.dumps(content))
    logs = plan.log_dir / f"{run_id}_x/attempt_0/0"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "stderr.log").write_text(f"line\n{node.text}\n")
    keep_round(plan, run_id, Outcome(code=1, failures=(Failure(rank=0, exitcode=1, text=node.text),)))
    keep_left_out(plan, "torch", redact(node.text, node.secrets))
    folder = write_report(plan, make_report(plan, 1, node.text, {}, 0.0))
    files = [*folder.glob("*"), *plan.log_dir.glob("*.jsonl")]
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    return "\n".join(file.read_text() for file in files)


def reported(node: Planted) -> str:
    failed(node)
    assert app.cli.report.main([], node.environ, Path("none")) == 0
    return node.screen()


def bundled(node: Planted) -> str:
    failed(node)
    packed = app.cli.report.bundle(node.plan.script.run_dir, node.found, node.secrets)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        read = [archive.extractfile(member) for member in archive.getmembers()]
        return "\n".join(file.read().decode() for file in read if file)


def told_to_other_nodes(node: Planted) -> str:
    failed(node)
    own = Node(
        plan=node.plan,
        folder=node.folder,
        preloaded=Preloaded((), {}, lambda _name, _why: None),
        before={},
        clean=lambda text: redact(text, node.secrets),
    )
    failure = Failure(rank=0, exitcode=1, text=node.text, local_rank=0)
    return json.dumps(asdict(asyncio.run(own.explain("default-1-abc", failure))))


WAYS: list[Callable[[Planted], str]] = [
    said,
    refused,
    started,
    explained,
    lambda node: explained(node, "--json"),
    examined,
    failed,
    reported,
    bundled,
    told_to_other_nodes,
]
NAMES = ["say", "refusal", "start", "explain", "explain --json", "doctor", "files", "report", "bundle", "wire"]


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@settings(
    max_examples=3, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    secret=st.from_regex(r"[A-Za-z0-9]{16,40}", fullmatch=True),
    value=st.from_regex(r"[a-z]{4}[ -~]{4,20}[a-z]", fullmatch=True),
)
def test_no_planted_secret_leaves(
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
    way: Callable[[Planted], str],
    secret: str,
    value: str,
) -> None:
    folder = tmp_path_factory.mktemp("node")
    token = folder / "token"
    # Where this process reads it, and where the made-up machine has it.
    for file in (token, folder / "machine" / token.relative_to("/")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{secret[::-1]}\n")
    texts = [shape.format(secret) for shape in SHAPES]
    texts += [value, json.dumps(value), base64.b64encode(f"user:{secret[::-1]}".encode()).decode()]
    environ = {
        **MACHINES["laptop"](folder / "machine"),
        "RUN_DIR": str(folder / "run"),
        "TRAIN_ARGS": shlex.join(texts),
        "CLUSTER_TOKEN_FILE": str(token),
        "DB_PASSWORD": value,
    }

    def screen() -> str:
        return "".join(capfd.readouterr())

    screen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DB_PASSWORD", value)
        out = way(Planted(folder=folder, text="\n".join(texts), environ=environ, screen=screen))
    assert out
    for hidden in (secret, secret[::-1], value, base64.b64encode(secret[::-1].encode()).decode()[4:16]):
        assert hidden not in out
