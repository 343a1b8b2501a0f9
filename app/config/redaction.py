"""Removes secrets from all that leaves: what is printed, told to other nodes, written to report files and a bundle.

Two ways find them: values that are known (variables with a telling name, the cluster token), in every form that they
take in files, and texts that look like a secret. The shapes follow the rules of gitleaks and detect-secrets.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from app.config.settings import Settings

REMOVED = "[removed]"
SHORTEST_SECRET = 6
"""Characters: shorter values ("1", "true") would blot out half of every log."""
SHORTEST_FORM = 8
"""Characters of a value in base64: fewer are in every long line by accident."""
SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|STORAGE_?KEY|PRIVATE|CREDENTIAL|AUTH|COOKIE|WEBHOOK|"
    r"CONN(?:ECTION)?_?STR|_DSN$|^NOTIFY$",
    re.IGNORECASE,
)
KEY = r"(?:api|access|account|auth|encryption|license|master|private|secret|signing|storage|wandb)[-_]?key"
OPTION = (
    r"--?(?!(?:bos|cls|eos|image|mask|pad|sep|unk)[-_])(?:[a-z0-9]+[-_.]){0,6}"
    rf"(?:token|secret|passw(?:or)?d|passphrase|{KEY}|credentials?)"
)
EDGE = r"(?:\b|(?<=\\[nrt]))"
"""Where a word begins, also behind a line end that JSON or Python's notation has spelt out."""
PEM = r"PRIVATE KEY(?: BLOCK)?-----"
PATTERNS = (
    re.compile(rf"-----BEGIN [A-Z ]{{0,32}}{PEM}(?s:.{{0,16384}}?-----END [A-Z ]{{0,32}}{PEM}|.{{0,16384}})"),
    # The file's end may begin within one.
    re.compile(rf"\A(?s:.{{0,16384}}?)-----END [A-Z ]{{0,32}}{PEM}"),
    # Addresses: user and password, a password alone (redis), a token alone.
    re.compile(r"(?<=://)[^/\s:@\"']*:[^/\s\"']+(?=@)"),
    re.compile(r"(?<=://)[A-Za-z0-9_-]{16,}(?=@)"),
    # Signed addresses, of S3, Google and Azure.
    re.compile(rf"(?i){EDGE}(?:sig|signature|x-(?:amz|goog)-(?:signature|credential))=(?P<secret>[^&\s\"']{{6,}})"),
    # Addresses that are secrets: whoever has one may write there.
    re.compile(r"hooks\.slack\.com/(?:services|workflows|triggers)/(?P<secret>[\w/-]{8,})"),
    re.compile(r"discord(?:app)?\.com/api/(?:v[0-9]+/)?webhooks/(?P<secret>[\w/-]{8,})"),
    re.compile(r"(?:\.webhook\.office\.com/webhook|\.logic\.azure\.com)[^\s\"'/]*/(?P<secret>[^\s\"']{8,})"),
    re.compile(r"hooks\.zapier\.com/hooks/catch/(?P<secret>[\w/-]{4,})"),
    re.compile(rf"{EDGE}bot(?P<secret>[0-9]{{6,12}}:[A-Za-z0-9_-]{{30,}})"),
    # Headers.
    re.compile(r"(?i)(?<=bearer )[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?i)authorization[\"']?\s{0,9}[=:]\s{0,9}[\"']?basic\s+(?P<secret>[A-Za-z0-9+/=]{8,})"),
    re.compile(rf"(?i){EDGE}cookies?[\"']?\s{{0,9}}[=:]\s{{0,9}}[\"']?(?P<secret>[\w.-]{{1,64}}=[^\r\n\"']{{4,8192}})"),
    re.compile(rf"(?i){EDGE}[\w.-]{{0,32}}(?:session|sessionid|csrf|csrftoken)=(?P<secret>[A-Za-z0-9%._~+/=-]{{20,}})"),
    # netrc, on one line or several.
    re.compile(
        rf"{EDGE}(?:machine|login|default)\s{{1,9}}\S{{1,256}}\s{{1,9}}(?:account\s{{1,9}}\S{{1,256}}\s{{1,9}})?password\s{{1,9}}"
        r"(?P<secret>[^\s\"']+)"
    ),
    # Known beginnings of keys.
    re.compile(rf"{EDGE}eyJ[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]+"),
    re.compile(
        rf"{EDGE}(?:hf_|gh[opsur]_|github_pat_|glpat-|glsa_|sk-|[rs]k_live_|xox[abeprs]-|xapp-|AKIA|ASIA|AIza|npm_|pypi-|"
        r"dckr_pat_|nvapi-|gsk_|r8_|hvs\.|ya29\.|SG\.|dop_v1_|lin_api_|tskey-|wandb_v1_)[A-Za-z0-9_.-]{12,}"
    ),
    re.compile(rf"{EDGE}wandb\s{{1,9}}login\s{{1,9}}(?:--?\w+\s{{1,9}}){{0,4}}(?P<secret>[0-9a-f]{{40}})\b"),
    # NAME=value, "name": "value", `--name value`.
    re.compile(
        rf"(?i)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|{KEY})[\"']?\s{{0,9}}[=:]\s{{0,9}}"
        r"[\"']?(?P<secret>[^\s\"',;}<\[][^\s\"',;}]{5,})"
    ),
    re.compile(
        rf"(?i)(?:(?<![\w-])|(?<=\\[nrt])){OPTION}(?:\s{{1,9}}|[\"']\s{{0,9}},\s{{0,9}}[\"'])[\"']?(?P<secret>[^\s\"',;}}<\[-][^\s\"',;}}]{{5,}})"
    ),
)
"""Repetitions are bounded, or end where their beginning may begin again: a log may be one line of a megabyte."""
SECRET_OPTION = re.compile(OPTION, re.IGNORECASE)


def redact(content: str, secrets: Iterable[str] = ()) -> str:
    """`content` without the `secrets`, longest first, and without what looks like one."""
    for secret in sorted(secrets, key=len, reverse=True):
        content = content.replace(secret, REMOVED)
    for pattern in PATTERNS:
        content = pattern.sub(_blot, content)
    return content


def redact_data(value: object, secrets: Sequence[str] = ()) -> object:
    """`value`, of dicts, lists and texts, with each text redacted: what is written as JSON stays JSON."""
    if isinstance(value, str | Path):
        return redact(str(value), secrets)
    if isinstance(value, Mapping):
        return {name: _of_name(str(name), each, secrets) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [*_of_list(value, secrets)]
    return value


def _of_name(name: str, value: object, secrets: Sequence[str]) -> object:
    # The name and its value, as one text has them.
    if isinstance(value, str) and redact(f"{name}={value}", secrets) != f"{name}={redact(value, secrets)}":
        return REMOVED
    return redact_data(value, secrets)


def _of_list(values: Sequence[object], secrets: Sequence[str]) -> Iterator[object]:
    """A command line has a secret behind the option that names it."""
    before: object = None
    for value in values:
        named = isinstance(before, str) and bool(SECRET_OPTION.fullmatch(before))
        before = value
        yield REMOVED if named and not str(value).startswith("-") else redact_data(value, secrets)


def _blot(found: re.Match[str]) -> str:
    secret = found.groupdict().get("secret")
    return REMOVED if secret is None else found[0].replace(secret, REMOVED)


def secrets_of(values: Mapping[str, str], token_files: Iterable[Path | None] = ()) -> tuple[str, ...]:
    """Values that must not leave this machine, in all their forms: variables with a telling name, and the tokens in
    these files."""
    paths = {str(path) for path in token_files if path}
    found = [value for name, value in values.items() if SECRET_NAME.search(name)]
    # Several addresses, each of which may stand alone somewhere.
    found += [part for name, value in values.items() if name.endswith("NOTIFY") for part in re.split(r"[\s,;]+", value)]
    for path in paths:
        try:
            found.append(Path(path).read_text(encoding="utf-8", errors="replace").strip())
        except OSError:
            continue
    # A path to a secret is none, and explains much.
    secrets = {value for value in found if len(value) >= SHORTEST_SECRET and value not in paths}
    return tuple({form for value in secrets for form in _forms(value)})


def settings_secrets(settings: Settings) -> tuple[str, ...]:
    """Those of the settings, whether a plan can be made of them or not; all of `secrets/env`, whatever their names."""
    token = settings.cluster_token_file.value if settings.cluster_token_file else None
    return secrets_of(
        {f"SECRET {name}" if value.secret else name: value.text for name, value in settings.values.items()}, [token]
    )


def _forms(value: str) -> Iterator[str]:
    """A value as it may stand in a file: as it is, in JSON, in Python's notation, in a shell's, in an address, in
    base64 wherever it begins in it, in hexadecimal digits."""
    # `explain` of a start without a secret needs none of these.
    import base64
    import json

    yield value
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield repr(value)[1:-1]
    yield value.replace("'", "'\"'\"'")
    yield quote(value, safe="", errors="replace")
    raw = value.encode(errors="surrogateescape")
    yield raw.hex()
    for before in range(3):
        # Digits that also hold bits of what stands around it are left: they differ.
        first, last = -(-before * 8 // 6), (before + len(raw)) * 8 // 6
        for digits in (base64.b64encode, base64.urlsafe_b64encode):
            form = digits(bytes(before) + raw).decode()[first:last]
            if len(form) >= SHORTEST_FORM:
                yield form
