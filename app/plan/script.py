"""Which script runs, with which arguments, and in which folders."""

import shlex
from pathlib import Path

from app.config.parsers import Malformed
from app.config.problems import count
from app.config.settings import Settings, refused
from app.config.values import Value
from app.host import Host
from app.host.mounts import mount_of
from app.host.paths import Seen
from app.plan.decisions import Ledger
from app.plan.launchers import Unwrapped, unwrap
from app.plan.parts import Script
from app.plan.places import on_host
from app.plan.script_text import concerns

IMAGE = Path("/opt/torchrun-compose")
"""Where this project lies in its image."""


IMAGE_HOME = "/tmp"  # noqa: S108 - as in the Dockerfile
CURRENT = "."
SHORTEST_TOKEN = 16
"""Bytes."""
Words = tuple[str, ...]


def requested(settings: Settings) -> tuple[Value[Words], Value[Words] | None]:
    """The script and its arguments, in shell words. Arguments of the entrypoint win.

    Arguments that begin with a dash (other than -m) are for the script of TRAIN_SCRIPT.
    """
    argv = settings.argv
    if not argv:
        return settings.train_script, settings.train_args
    script = argv[0] == "-m" or not argv[0].startswith("-")
    name = "TRAIN_SCRIPT" if script else "TRAIN_ARGS"
    given = Value(name=name, text=shlex.join(argv), source="command line", value=argv)
    return (given, None) if script else (settings.train_script, given)


def files_to_look_at(settings: Settings) -> tuple[str, ...]:
    """Paths that the plan depends on, for `probe`."""
    script, _ = requested(settings)
    words = _words(script).words
    named = (settings.run_dir, settings.checkpoint_dir, settings.cluster_token_file)
    given = [str(each.value) for each in named if each]
    folders = [*given, str(_run_dir(settings)), str(settings.runs_root.value), CURRENT, settings.text("HOME")]
    # The whole text too: a file with a space in its name was meant, if it is there.
    scripts = [] if words[:1] == ("-m",) else [*words[:1], script.text]
    return tuple(dict.fromkeys(filter(None, [*scripts, *folders])))


def module_to_find(settings: Settings) -> str:
    """The module that `-m` names, for `probe`."""
    words = _words(requested(settings)[0]).words
    return words[1] if words[:1] == ("-m",) and len(words) > 1 else ""


def program_to_find(settings: Settings) -> str:
    """The script, or the program of the image, for `probe`."""
    words = _words(requested(settings)[0]).words
    return "" if words[:1] == ("-m",) else "".join(words[:1])


def _words(script: Value[Words]) -> Unwrapped:
    return unwrap(list(script.value))


def log_dir(run_dir: Path, node_rank: int) -> Path:
    """What torchrun and the workers of one node leave."""
    return run_dir / "logs" / f"node{node_rank}"


def warn_script(script: Script, settings: Settings, host: Host, nnodes: int, ledger: Ledger) -> None:
    """What will stand in the way of the user's own script, though it may be meant."""
    if requested(settings)[0].source == "default":
        return
    here = host.files.get(CURRENT, Seen())
    mount = mount_of(host.cwd, host.mounts)
    if here.obstacle and not (mount and mount.read_only):
        _, why, remedy = _unwritable(here, settings, host)
        ledger.warn("script.current-folder", setting="WORKSPACE", why=why, remedy=remedy)
    place, text = host.program
    ledger.warnings += concerns(Path(place).name, text, nnodes)


def _unwritable(seen: Seen, settings: Settings, host: Host) -> tuple[bool, str, str]:
    """Whether it is mounted read-only; what cannot be written, by whom; and the command that lets them."""
    path = host.cwd / seen.obstacle
    place = on_host(path, host, settings)
    mount = mount_of(path, host.mounts)
    if mount and mount.read_only and host.container:
        return True, f"{path} is mounted read-only", "Remove :ro from RUNS, or name another folder"
    outside = f" ({place} on the host)" if place else ""
    what = f"user {host.uid} cannot make files and folders in {path}{outside}"
    if not place or not seen.owner:
        return False, what, "Correct the path, or let that user write there"
    owner = f"`sudo chown -R {host.uid}:{host.gid} {shlex.quote(str(place))}`"
    return False, what, f"Run {owner}, or set RUN_AS={seen.owner}, its owner"


def decide_script(settings: Settings, host: Host, ledger: Ledger) -> Script:
    """Command and folders; what is not there or cannot be used is a problem."""
    script, arguments = requested(settings)
    asked = _words(script)
    words = _found(asked.words, host)
    ledger.take("script", script, _reason(settings, asked, words, script.source))
    if wrong := asked.wrong or _wrong_script(words, script, host):
        ledger.problems.append(refused(wrong, script, "script"))
    if arguments is not None:
        own = settings.train_args or arguments
        why = "the script's arguments" if own == arguments else f"in place of {own}"
        ledger.take("script", arguments, why)
    for value, reason in (
        (settings.data, "what the script of this project reads in place of Python's own source"),
        (settings.log_bytes, "the most that a file of a rank's output may hold; one older one is kept"),
        (settings.run_name, "names the job: its folder, and whom nodes answer"),
        (settings.runs_root, "holds a folder for each run"),
    ):
        if value is not None:
            ledger.take("script", value, reason)
    loaded = "loaded once for all rounds" if settings.preload.value else "each process loads its own modules"
    ledger.take("script", settings.preload, loaded)
    run_dir = _folder("RUN_DIR", settings.run_dir, _run_dir(settings), settings, host, ledger)
    inside = run_dir / "checkpoints"
    checkpoints = _folder("CHECKPOINT_DIR", settings.checkpoint_dir, inside, settings, host, ledger)
    return Script(
        command=(*words, *(arguments.value if arguments else ())),
        run_dir=run_dir,
        checkpoint_dir=checkpoints,
        places=(on_host(run_dir, host, settings), on_host(checkpoints, host, settings)),
        home=_home(settings, host),
        preload=settings.preload.value,
    )


def _run_dir(settings: Settings) -> Path:
    return settings.runs_root.value / settings.run_name.value


def _found(words: tuple[str, ...], host: Host) -> tuple[str, ...]:
    """The same, with the whole path of a program that lies on PATH."""
    place = host.program[0]
    found = words and host.files.get(words[0], Seen()).kind == "missing" and place
    return (place, *words[1:]) if found else words


def _reason(settings: Settings, asked: Unwrapped, words: tuple[str, ...], source: str) -> str:
    if source == "default":
        return "the script of this project; TRAIN_SCRIPT names yours"
    if settings.train_args is not None and source == "command line":
        return f"in place of TRAIN_SCRIPT and {settings.train_args}"
    if asked.left_out:
        return f"{shlex.join(words)}, without {asked.left_out}: torchrun starts it"
    if words != asked.words:
        return f"the program {words[0]}"
    return f"module {words[1]}" if words[:1] == ("-m",) and len(words) > 1 else "as you set it"


def _wrong_script(words: Words, script: Value[Words], host: Host) -> Malformed | None:
    """What is wrong with it; None if it can be started."""
    if not words or words == ("-m",):
        return Malformed("none-named")
    if words[0] == "-m":
        return None if host.module else Malformed("no-module", package=words[1].partition(".")[0])
    if len(words) > 1 and script.text in host.files and host.files[script.text].kind == "file":
        return Malformed("space-in-name", text=script.text)
    named = f"{words[0]}: " if len(words) > 1 else ""
    kind = host.files.get(words[0], Seen()).kind
    if kind == "missing":
        bare = "/" not in words[0] and "." not in words[0]
        return Malformed("missing", named=named, image=host.project == IMAGE, bare=bare)
    if kind == "folder":
        return Malformed("folder", named=named)
    return Malformed("unreadable", named=named, uid=host.uid) if kind == "unreadable" else None


def _folder(
    name: str, value: Value[Path] | None, default: Path, settings: Settings, host: Host, ledger: Ledger
) -> Path:
    wanted = default if value is None else value.value
    if value is not None:
        source, reason = value.source, "as you set it"
    else:
        source, reason = "derived", "RUNS_ROOT and RUN_NAME" if name == "RUN_DIR" else "inside RUN_DIR"
    ledger.decide("script", name, host.cwd / wanted, source, reason)
    seen = host.files.get(str(wanted), Seen())
    if seen.obstacle:
        read_only, why, remedy = _unwritable(seen, settings, host)
        about = value or settings.runs_root
        ledger.refuse("script.read-only" if read_only else "script.unwritable", given=about, why=why, remedy=remedy)
    return host.cwd / wanted


def _home(settings: Settings, host: Host) -> Path | None:
    """Of each user one, since RUN_AS may change, and beside the runs, where there is room and what lies there lasts. In
    images of others the engine sets HOME to what their list of users says, where nothing may be written."""
    root, own = str(settings.runs_root.value), settings.text("HOME")
    kept = own not in ("", IMAGE_HOME) and not host.files.get(own, Seen()).obstacle
    if not host.container or host.files.get(root, Seen()).obstacle or kept:
        return None
    return host.cwd / root / ".home" / str(host.uid)


def decide_token(settings: Settings, host: Host, ledger: Ledger) -> Path | None:
    """The file with the secret that the nodes share, if one is set."""
    value = settings.cluster_token_file
    if value is None:
        return None
    ledger.take("settings", value, "the nodes prove to each other that they know its content")
    seen = host.files.get(str(value.value))
    if wrong := _wrong_token(seen):
        ledger.refuse("settings.token-file", given=value, why=wrong)
    elif seen and seen.kind == "unreadable":
        ledger.refuse("settings.token-unreadable", given=value, uid=host.uid)
    return host.cwd / value.value


def _wrong_token(seen: Seen | None) -> str:
    if seen is None:
        return ""
    words = {"missing": "there is no such file", "folder": "this is a folder"}
    if seen.kind == "file":
        return f"it holds only {count(seen.size, 'byte')}" if seen.size < SHORTEST_TOKEN else ""
    return words.get(seen.kind, "")
