"""The commands of the desk: which command, its options, exit code."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.config.console import say
from app.config.errors import UserError
from app.config.options import Parser
from app.config.project import VERSION
from app.fleet.hosts import read_desk

COMMANDS: Mapping[str, tuple[str, str]] = {
    "check": ("check", "each host: ssh, Docker, Compose, GPUs, disk, clock, image, and what is missing"),
    "push": ("push", "project, settings, scripts, secrets and image on every host; only what changed"),
    "up": ("gang", "push, start on all hosts, and the verdict of the roll call"),
    "status": ("status", "what every node does at this moment, in one table"),
    "watch": ("watch", "the same again and again with curves; --web: as a page"),
    "stacks": ("status", "where every rank is at this moment; nothing is stopped"),
    "notify": ("status", "--test: tries the services of NOTIFY"),
    "logs": ("logs", "what all ranks of all nodes say, as one stream"),
    "stop": ("gang", "stop on all hosts, after a checkpoint"),
    "restart": ("gang", "stop on all hosts, then start on all"),
    "down": ("gang", "stop, and remove the containers; results stay"),
    "doctor": ("together", "is this cluster fit to train? one table of all nodes"),
    "bench": ("together", "what the network between the hosts gives"),
    "explain": ("together", "what differs between the nodes in what a start would use"),
    "report": ("results", "what went wrong: every node's report in one archive, one verdict"),
    "pull": ("results", "checkpoints, logs and metrics to this machine"),
    "run": ("together", "a command in the trainer's image on all hosts"),
    "shell": ("together", "a shell in the trainer of one host"),
}
"""Name: the module of app.fleet whose function of this name is the command, and what it does."""
INTERRUPTED = 130


def main(arguments: Sequence[str], environ: Mapping[str, str], start: Path) -> int:
    """Runs one command on the hosts; returns the exit code. Raises UserError."""
    listed = "\n".join(f"  {name:<10} {does}" for name, (_, does) in COMMANDS.items())
    parser = Parser(
        prog="torchrun-compose",
        description="All nodes from one terminal.",
        usage=f"torchrun-compose [-C FOLDER] [--on HOST,...] COMMAND ...\n\n{listed}",
        epilog="COMMAND --help tells more. Exit code: 0 done, 1 something is wrong on a host, 2 wrong settings.",
    )
    parser.add_argument("-C", dest="folder", type=Path, default=start, help="the checkout (this folder)")
    parser.add_argument("--on", metavar="HOST,...", help="these hosts only, by name or rank")
    parser.add_argument("--version", action="version", version=f"torchrun-compose {VERSION}")
    at = next((place for place, word in enumerate(arguments) if word in COMMANDS), len(arguments))
    wanted = parser.read(arguments[:at])
    if at == len(arguments):
        parser.error("no command" if not arguments else f"unknown command {arguments[-1]}")
    name = arguments[at]
    command = getattr(importlib.import_module(f"app.fleet.{COMMANDS[name][0]}"), name)
    if {"-h", "--help"} & {*arguments[at + 1 :][:1]}:
        # Help needs no hosts.
        return int(command(None, arguments[at + 1 :]))
    desk = read_desk(wanted.folder.resolve(), environ)
    return int(command(desk.only(wanted.on.split(",")) if wanted.on else desk, arguments[at + 1 :]))


def entry() -> int:
    """The console script `torchrun-compose`."""
    try:
        return main(sys.argv[1:], os.environ, Path.cwd())
    except UserError as error:
        say(error.message)
        return error.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Who reads our output, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
