"""Which script runs, with which arguments, and in which folders."""

import re
import shlex
from pathlib import Path

from app.config.envfile import Value
from app.config.errors import printable
from app.config.settings import Settings
from app.host import Host
from app.host.paths import Seen
from app.plan.decisions import Ledger, count, shown
from app.plan.parts import Script

IMAGE = Path("/opt/torchrun-compose")
"""Where this project lies in its image."""


NAMED = (
    ("DATA", "what the script of this project reads in place of Python's own source"),
    ("RUN_NAME", "names the job: its folder, and whom nodes answer"),
    ("RUNS_ROOT", "holds a folder for each run"),
)
SHORTEST_TOKEN = 16
"""Bytes, as in app.supervise.node."""


def requested(settings: Settings) -> tuple[Value, Value | None]:
    """The script and its arguments, in shell words. Arguments of the entrypoint win.

    Arguments that begin with a dash (other than -m) are for the script of TRAIN_SCRIPT.
    """
    argv, given = settings.argv, Value(text=shlex.join(settings.argv), source="command line")
    if argv and (argv[0] == "-m" or not argv[0].startswith("-")):
        return given, None
    script = settings.get("TRAIN_SCRIPT") or Value(text="", source="default")
    return script, given if argv else settings.values.get("TRAIN_ARGS")


def files_to_look_at(settings: Settings) -> tuple[str, ...]:
    """Paths that the plan depends on, for `probe`."""
    script, _ = requested(settings)
    words = shlex.split(script.text)
    run_dir = settings.text("RUN_DIR") or str(_run_dir(settings))
    folders = [str(Path(text)) for text in (run_dir, settings.text("CHECKPOINT_DIR")) if text]
    # The whole text too: a file with a space in its name was meant, if it is there.
    scripts = [] if words[:1] == ["-m"] else [*words[:1], script.text]
    return tuple(dict.fromkeys(filter(None, [*scripts, settings.text("CLUSTER_TOKEN_FILE"), *folders])))


def module_to_find(settings: Settings) -> str:
    """The module that `-m` names, for `probe`."""
    words = shlex.split(requested(settings)[0].text)
    return words[1] if words[:1] == ["-m"] and len(words) > 1 else ""


def log_dir(run_dir: Path, node_rank: int) -> Path:
    """What torchrun and the workers of one node leave."""
    return run_dir / "logs" / f"node{node_rank}"


def decide_script(settings: Settings, host: Host, ledger: Ledger) -> Script:
    """Command and folders; what is not there or cannot be used is a problem."""
    script, arguments = requested(settings)
    words = shlex.split(script.text)
    ledger.take("TRAIN_SCRIPT", script, _reason(settings, words, script.source))
    _check_command(words, script, host, ledger)
    if arguments is not None:
        own = settings.values.get("TRAIN_ARGS", arguments)
        why = "the script's arguments" if own == arguments else f"in place of {shown('TRAIN_ARGS', own)}"
        ledger.take("TRAIN_ARGS", arguments, why)
    for name, reason in NAMED:
        value = settings.get(name)
        if value is not None:
            ledger.take(name, value, reason)
    run_dir = _folder("RUN_DIR", _run_dir(settings), settings, host, ledger)
    checkpoints = _folder("CHECKPOINT_DIR", run_dir / "checkpoints", settings, host, ledger)
    return Script(
        command=(*words, *shlex.split(arguments.text if arguments else "")),
        run_dir=run_dir,
        checkpoint_dir=checkpoints,
    )


def _run_dir(settings: Settings) -> Path:
    return Path(settings.text("RUNS_ROOT")) / settings.text("RUN_NAME")


def _reason(settings: Settings, words: list[str], source: str) -> str:
    if source == "default":
        return "the script of this project; TRAIN_SCRIPT names yours"
    args = settings.values.get("TRAIN_ARGS")
    if args is not None and source == "command line":
        return f"in place of TRAIN_SCRIPT and {shown('TRAIN_ARGS', args)}"
    return f"module {words[1]}" if words[:1] == ["-m"] and len(words) > 1 else "as you set it"


def _check_command(words: list[str], script: Value, host: Host, ledger: Ledger) -> None:
    if wrong := _wrong_script(words, script, host):
        ledger.refuse("TRAIN_SCRIPT", f"{shown('TRAIN_SCRIPT', script)}: {wrong}")


def _wrong_script(words: list[str], script: Value, host: Host) -> str:
    """What is wrong with it, and the cure; empty if it can be started."""
    if not words or words == ["-m"]:
        return "it names no script. Write a path, or -m and a module."
    if words[0] == "-m":
        missing = (
            f"Python finds no {printable(words[1].partition('.')[0])!r} here. Correct the name, or set PYTHONPATH."
        )
        return "" if host.module else missing
    if re.fullmatch(r"(.*/)?(python[0-9.]*|torchrun)", words[0]):
        return "that is a program. Write the script and its arguments alone: torchrun and Python are started for it."
    if len(words) > 1 and script.text in host.files and host.files[script.text].kind == "file":
        return f"the space ends the name. Quote it in the value: TRAIN_SCRIPT=\"'{printable(script.text)}'\"."
    where = "here"
    if host.project == IMAGE:
        where = "in the container, which has ./workspace of the stack's folder as /workspace"
    wrong = {
        "missing": f"there is no such file {where}. Correct the path, or write -m for a module.",
        "folder": "this is a folder. Write the path of a script, or -m for a module.",
        "unreadable": f"user {host.uid} cannot read it. Let that user read it, or correct the path.",
    }.get(host.files.get(words[0], Seen()).kind, "")
    return f"{printable(words[0])}: {wrong}" if wrong and len(words) > 1 else wrong


def _folder(name: str, default: Path, settings: Settings, host: Host, ledger: Ledger) -> Path:
    value = settings.values.get(name)
    wanted = default if value is None else Path(value.text)
    if value is None:
        source = "derived"
        reason = "RUNS_ROOT and RUN_NAME" if name == "RUN_DIR" else "inside RUN_DIR"
    else:
        source, reason = value.source, "as you set it"
    ledger.decide(name, host.cwd / wanted, source, reason)
    obstacle = host.files.get(str(wanted), Seen()).obstacle
    if obstacle:
        by, cause = (name, value) if value else ("RUNS_ROOT", settings.get("RUNS_ROOT"))
        ledger.refuse(
            name,
            f"{shown(by, cause) if cause else name}: user {host.uid} cannot make files and folders in "
            f"{printable(obstacle)}. Correct the path, or let that user write there.",
        )
    return host.cwd / wanted


def decide_token(settings: Settings, host: Host, ledger: Ledger) -> Path | None:
    """The file with the secret that the nodes share, if one is set."""
    value = settings.values.get("CLUSTER_TOKEN_FILE")
    if value is None:
        return None
    ledger.take("CLUSTER_TOKEN_FILE", value, "the nodes prove to each other that they know its content")
    if wrong := _wrong_token(host.files.get(value.text)):
        ledger.refuse(
            "CLUSTER_TOKEN_FILE",
            f"{shown('CLUSTER_TOKEN_FILE', value)}: {wrong}. Make one with `openssl rand -hex 32 > FILE` and copy it "
            "to all nodes.",
        )
    return host.cwd / value.text


def _wrong_token(seen: Seen | None) -> str:
    if seen is None:
        return ""
    words = {"missing": "there is no such file", "folder": "this is a folder"}
    if seen.kind == "file":
        return f"it holds only {count(seen.size, 'byte')}" if seen.size < SHORTEST_TOKEN else ""
    return words.get(seen.kind, "it cannot be read by this user")
