"""Secrets are removed from whatever leaves: known ones in every form, and what looks like one."""

import base64
import json
import re
import shlex
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cli.explain import explain
from app.config.redaction import REMOVED, redact, redact_data, secrets_of, settings_secrets
from app.engine.outcome import Failure, Outcome
from app.report.history import keep_round
from tests.machines.facts import drafted, settings_of

SECRETS = [
    "https://user:hunter22@host/repo",
    "Authorization: Bearer abcdefghijklmnop",
    "login with hf_abcdefghijklmnopqrst",
    "AWS_SECRET_ACCESS_KEY=abcd/efgh+ijkl",
    '"api_key": "0123456789"',
    "WANDB_API_KEY: 0123456789abcdef",
    "--token=abcdef123456",
    "--api-key 0123456789abcdef",
    "['--wandb-token', 'abcdef123456', '--lr']",
    "--db-password hunter22hunter22 --epochs",
    "https://abcdef1234560123456789@host/repo",
    "https://user:p@hunter22@host",
    "GET https://x.blob/data?sp=r&sig=abcdef123456%2Bx&se=2027",
    "https://s3/x?X-Amz-Date=1&X-Amz-Signature=0123456789abcdef",
    "Authorization: Basic aHVudGVyMjI6aHVudGVyMjI=",
    "{'Authorization': 'Basic aHVudGVyMjI6aHVudGVyMjI='}",
    "X-Api-Key: 0123456789abcdef",
    "jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcdef123456",
    "redis://:hunter22@cache:6379/0",
    "amqp://guest:hunter22@10.0.0.2/vhost",
    "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=abcdef123456abcdef123456==;EndpointSuffix=core",
    "Endpoint=sb://b.net/;SharedAccessKeyName=Root;SharedAccessKey=abcdef123456=",
    "BlobEndpoint=https://a.net;SharedAccessSignature=sv=2027&sig=abcdef123456%3D",
    "POST https://hooks.slack.com/services/T00000000/B00000000/abcdef123456",
    "https://discord.com/api/webhooks/1234/abcdef123456-hunter22",
    "https://contoso.webhook.office.com/webhookb2/hunter22@x/IncomingWebhook/abcdef123456/y",
    "https://api.telegram.org/bot0123456789:abcdef123456abcdef123456abcdef123456/getMe",
    "curl -H 'Cookie: wandb_session=abcdef123456; user=hunter22'",
    "{'Set-Cookie': 'sid=abcdef123456; Path=/'}",
    "GET /files?auth_session=abcdef123456abcdef123456",
    "machine api.wandb.ai login user password abcdef123456abcdef",
    "machine api.wandb.ai\n  login user\n  password hunter22\n",
    "wandb login --relogin abcdef1234560123456789abcdef123456012345",
    "npm_abcdef123456abcdef123456 glsa_abcdef123456abcdef",
    "-----BEGIN PGP PRIVATE KEY BLOCK-----\nabcdef123456\n-----END PGP PRIVATE KEY BLOCK-----",
    "-----BEGIN ENCRYPTED PRIVATE KEY-----\\nabcdef123456\\n-----END ENCRYPTED PRIVATE KEY-----",
    "-----BEGIN RSA PRIVATE KEY-----\nabcdef123456\nhunter22\n-----END RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize("line", SECRETS)
def test_what_looks_like_a_secret_is_removed_wherever_it_stands(line: str) -> None:
    clean = redact(f"before {line} after", ())
    assert REMOVED in clean
    for secret in ("hunter22", "abcdefghijklmnop", "abcd/efgh", "0123456789", "abcdef123456", "aHVudGVy"):
        assert secret not in clean
    assert clean.startswith("before ")
    assert clean.endswith(" after")


@pytest.mark.parametrize(
    "line",
    [
        "loss 3.21, 512 tokens",
        "tokenizer: gpt2",
        "NODES=10.0.0.1,10.0.0.2",
        "key 5: value",
        "--tokenizer gpt2-medium --max-tokens 512000 --key-padding 5",
        "'eos_token': '<|endoftext|>', --image-token [IMAGE] --special-token <|user|>",
        "--sort-key timestamp --label-key categories --pad-token endoftext",
        "Loading tokens from https://host:8080/data?name=train&page=17",
        "http://10.0.0.1:29400 answered user@host",
        "redis://cache:6379/0 and tcp://10.0.0.1:29500, mail to a@b",
        "session=train sid=3 cookies: 5, login as root, default password policy",
        "the webhook of discord.com/channels, https://hooks.slack.com/docs",
        "torch.Size([2, 3]) at bot.py:12, SharedAccessKeyName=Root",
        "basic settings, bearer of news, eyJust a word",
    ],
)
def test_ordinary_lines_are_left_as_they_are(line: str) -> None:
    assert redact(line, ()) == line


def test_values_of_variables_with_a_telling_name_and_the_token_are_secrets(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123\n")
    settings = settings_of(
        {"CLUSTER_TOKEN_FILE": str(token), "WANDB_API_KEY": "wandb-value", "DB_PASSWORD": "short", "LANG": "C.UTF-8"}
    )
    secrets = settings_secrets(settings)
    assert {"0123456789abcdef0123", "wandb-value"} <= {*secrets}
    assert not {"short", "C.UTF-8", str(token)} & {*secrets}


def test_the_end_of_a_private_key_at_the_beginning_of_a_text_is_removed() -> None:
    assert redact("Zm9v\nYmFy\n-----END PRIVATE KEY-----\nafter", ()) == f"{REMOVED}\nafter"


def test_a_secret_is_removed_in_every_form_that_it_takes_in_files(tmp_path: Path) -> None:
    value = "a\"b\\c'd@e-secret"
    secrets = settings_secrets(settings_of({"DB_PASSWORD": value}))
    texts = [json.dumps({"x": value}), repr(value), shlex.quote(value), quote(value, safe=""), value]
    assert not [text for text in texts if "e-secret" in redact(text, secrets)]


def test_a_long_line_is_redacted_in_a_moment() -> None:
    started = time.process_time()
    for piece in ("0a", "-", "a-", "TOKEN_", "://a", "--token", "-a", "-----BEGIN PRIVATE KEY-----"):
        redact(piece * (500_000 // len(piece)), ())
    assert time.process_time() - started < 8


VALUES = st.text(min_size=8, max_size=40).filter(lambda value: not REMOVED.startswith(value[:1]) and value.strip())
AROUND = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)


@given(value=VALUES, before=AROUND, after=AROUND)
def test_a_known_secret_never_leaves_in_any_of_its_forms(value: str, before: str, after: str) -> None:
    secrets = secrets_of({"MY_TOKEN": value})
    forms = [value, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value, safe="")]
    for form in forms:
        assert form not in redact(f"{before}{form}{after}", secrets)


@given(value=st.binary(min_size=12, max_size=40).map(bytes.hex), user=st.text(st.characters(codec="ascii"), max_size=9))
def test_a_known_secret_never_leaves_in_base64_whatever_stands_before_it(value: str, user: str) -> None:
    secrets = secrets_of({"MY_TOKEN": value})
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        clean = redact(f"sent {encode(f'{user}{value}:x'.encode()).decode()}", secrets)
        assert REMOVED in clean
        for left in re.findall(r"[A-Za-z0-9+/_-]{8,}", clean.replace(REMOVED, " ")):
            for start in range(4):
                part = left[start:]
                decoded = base64.urlsafe_b64decode((part + "A" * (-len(part) % 4)).replace("+", "-").replace("/", "_"))
                assert value.encode()[4:12] not in decoded


SHAPES = [
    "https://user:{}@host/x",
    "redis://:{}@host:6379",
    "Authorization: Bearer {}",
    "AccountKey={};EndpointSuffix=x",
    "https://hooks.slack.com/services/T0/B0/{}",
    "machine h login u password {}",
    "Cookie: wandb={}; Path=/",
    "hf_{}",
    "--wandb-token {}",
    "HF_TOKEN={}",
    "-----BEGIN PRIVATE KEY-----{}-----END PRIVATE KEY-----",
    "https://x/y?a=b&sig={}",
]


@pytest.mark.parametrize("shape", SHAPES)
@given(secret=st.from_regex(r"[A-Za-z0-9]{16,40}", fullmatch=True), before=AROUND, after=AROUND)
def test_what_has_the_shape_of_a_secret_is_removed_and_once_is_enough(
    shape: str, secret: str, before: str, after: str
) -> None:
    clean = redact(f"{before} {shape.format(secret)} {after}")
    assert secret not in clean
    assert redact(clean) == clean


JSON = st.recursive(
    st.none()
    | st.integers()
    | st.text(max_size=30)
    | st.sampled_from([shape.format("a1b2c3d4" * 3) for shape in SHAPES]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(value=JSON)
def test_data_keep_their_shape_and_lose_their_secrets(value: object) -> None:
    clean = redact_data(value)
    assert "a1b2c3d4" * 3 not in json.dumps(clean)
    assert type(clean) is type(value)


def test_a_secret_behind_its_option_or_name_is_removed_from_data() -> None:
    words = ["train.py", "--wandb-token", "hunter2", "--epochs", "3", "--password", "--lr"]
    assert redact_data({"command": words, "api_key": "0123456789"}) == {
        "command": ["train.py", "--wandb-token", REMOVED, "--epochs", "3", "--password", "--lr"],
        "api_key": REMOVED,
    }


@pytest.mark.parametrize("as_json", [True, False])
def test_explain_tells_no_secret_of_the_arguments(tmp_path: Path, *, as_json: bool) -> None:
    args = "--wandb-token abcdef123456 --data https://user:hunter22@host/x"
    found = drafted("laptop", tmp_path / "machine", RUN_DIR=str(tmp_path / "run"), TRAIN_ARGS=args)
    out = StringIO()
    explain(found, as_json=as_json, out=out)
    assert "--wandb-token" in out.getvalue()
    assert "abcdef123456" not in out.getvalue()
    assert "hunter22" not in out.getvalue()


def test_rounds_are_kept_without_secrets_for_their_owner_alone(tmp_path: Path) -> None:
    plan = drafted("laptop", tmp_path / "machine", RUN_DIR=str(tmp_path / "run")).plan
    assert plan
    plan = replace(plan, script=replace(plan.script, env={**plan.script.env, "DB_PASSWORD": "correct horse"}))
    plan.log_dir.mkdir(parents=True)
    text = "ConnectionError: redis://:hunter22@cache refused 'correct horse'"
    keep_round(plan, "default-1", Outcome(code=1, failures=(Failure(rank=0, exitcode=1, text=text),)))
    file = plan.log_dir / "rounds.jsonl"
    line = json.loads(file.read_text())
    assert line["failures"][0]["text"] == f"ConnectionError: redis://{REMOVED}@cache refused '{REMOVED}'"
    assert file.stat().st_mode & 0o777 == 0o600
