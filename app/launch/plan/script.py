"""Which script runs, with which arguments, and in which folders."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from app.launch.errors import printable
from app.launch.host import Host
from app.launch.plan.ledger import Ledger, shown
from app.launch.settings import Settings

IMAGE = Path("/opt/torchrun-compose")
"""Where this project lies in its image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    command: tuple[str, ...]
    run_dir: Path
    checkpoint_dir: Path
    token_file: Path | None


NAMED = (
    ("DATA", "what the script of this project reads in place of Python's own source"),
    ("RUN_NAME", "names the job: its folder, and whom nodes answer"),
    ("RUNS_ROOT", "holds a folder for each run"),
)


def requested(settings: Settings) -> tuple[tuple[str, ...], str]:
    """The script part of torchrun's command, and where it comes from. Arguments of the entrypoint win.

    Arguments that begin with a dash (other than -m) are for the script of TRAIN_SCRIPT.
    """
    argv = settings.argv
    if argv and (argv[0] == "-m" or not argv[0].startswith("-")):
        return argv, "command line"
    script = settings.get("TRAIN_SCRIPT")
    words = shlex.split(script.text) if script else []
    source = script.source if script else "default"
    if argv:
        return (*words, *argv), f"{source}, arguments from the command line"
    return (*words, *shlex.split(settings.text("TRAIN_ARGS"))), source


def files_to_look_at(settings: Settings) -> tuple[str, ...]:
    """Paths whose existence the plan depends on, for `probe`."""
    command, _ = requested(settings)
    script = () if not command or command[0] == "-m" else command[:1]
    return (*script, *filter(None, [settings.text("CLUSTER_TOKEN_FILE")]))


def log_dir(run_dir: Path, node_rank: int) -> Path:
    """What torchrun and the workers of one node leave."""
    return run_dir / "logs" / f"node{node_rank}"


def decide_script(settings: Settings, host: Host, ledger: Ledger) -> Script:
    """Command and folders; a script that is not there is a problem."""
    command, source = requested(settings)
    ledger.decide("TRAIN_SCRIPT", shlex.join(command), source, _reason(settings, command, source))
    _check_command(command, source, host, ledger)
    for name, reason in NAMED:
        value = settings.get(name)
        if value is not None:
            ledger.take(name, value, reason)
    run_dir = _folder("RUN_DIR", Path(settings.text("RUNS_ROOT")) / settings.text("RUN_NAME"), settings, host, ledger)
    checkpoints = _folder("CHECKPOINT_DIR", run_dir / "checkpoints", settings, host, ledger)
    return Script(
        command=command,
        run_dir=run_dir,
        checkpoint_dir=checkpoints,
        token_file=_token_file(settings, host, ledger),
    )


def _reason(settings: Settings, command: tuple[str, ...], source: str) -> str:
    if source == "default":
        return "the script of this project; TRAIN_SCRIPT names yours"
    args = settings.values.get("TRAIN_ARGS")
    if args is not None and settings.argv[:1] and source == "command line":
        return f"in place of TRAIN_SCRIPT and {shown('TRAIN_ARGS', args)}"
    return f"module {command[1]}" if command[:1] == ("-m",) and len(command) > 1 else "as you set it"


def _check_command(command: tuple[str, ...], source: str, host: Host, ledger: Ledger) -> None:
    if not command or (command[0] == "-m" and len(command) == 1):
        ledger.refuse("TRAIN_SCRIPT", f"TRAIN_SCRIPT ({source}) names no script. Write a path, or -m and a module.")
        return
    script = command[0]
    if script == "-m" or script not in host.files or host.files[script] is not None:
        return
    where = "here"
    if host.project == IMAGE:
        where = "in the container, which has ./workspace of the stack's folder as /workspace"
    ledger.refuse(
        "TRAIN_SCRIPT",
        f"TRAIN_SCRIPT={printable(script)} ({source}): there is no such file {where}. Correct the path, "
        "or write -m for a module.",
    )


def _folder(name: str, default: Path, settings: Settings, host: Host, ledger: Ledger) -> Path:
    value = settings.values.get(name)
    path = host.cwd / (default if value is None else Path(value.text))
    if value is None:
        source = "derived"
        reason = "RUNS_ROOT and RUN_NAME" if name == "RUN_DIR" else "inside RUN_DIR"
    else:
        source, reason = value.source, "as you set it"
    ledger.decide(name, path, source, reason)
    return path


def _token_file(settings: Settings, host: Host, ledger: Ledger) -> Path | None:
    value = settings.values.get("CLUSTER_TOKEN_FILE")
    if value is None:
        return None
    ledger.take("CLUSTER_TOKEN_FILE", value, "the nodes prove to each other that they know its content")
    digest = host.files.get(value.text, "unknown")
    if not digest:
        wrong = "there is no such file" if digest is None else "it cannot be read by this user"
        ledger.refuse(
            "CLUSTER_TOKEN_FILE",
            f"{shown('CLUSTER_TOKEN_FILE', value)}: {wrong}. Put the same secret into it on every node.",
        )
    return host.cwd / value.text
