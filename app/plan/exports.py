"""The environment that torchrun and the workers get. Whatever the user set stays as it is."""

from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from app.config.envfile import COMPOSE
from app.config.settings import TABLE, Settings
from app.host import Host
from app.plan.decisions import Ledger
from app.plan.parts import Script
from app.plan.script import log_dir

LIBRARIES = ("NCCL_", "GLOO_", "TORCH_")
"""An empty variable of these is not "unset" to its library: NCCL reads an empty number as 0."""


@dataclass(slots=True, kw_only=True)
class Exports:
    """Collects variables; lives only inside `make_plan`."""

    settings: Settings
    ledger: Ledger
    env: dict[str, str] = field(default_factory=dict)

    def offer(self, check: str, name: str, value: object, reason: str, rejected: tuple[str, ...] = ()) -> None:
        """Exports `value`, unless the user set the variable."""
        given = self.settings.values.get(name)
        if given is None:
            self.env[name] = str(value)
            self.ledger.decide(check, name, value, "derived", reason, rejected)
            return
        if given.source == COMPOSE:
            why = reason
        elif given.text == str(value):
            why = f"as you set it; {reason}"
        else:
            why = f"as you set it, in place of {value}"
        self.ledger.decide(check, name, given.shown, given.source, why, rejected)

    def keep(self, check: str, name: str, reason: str) -> None:
        """Records a variable that is exported only because the user set it."""
        given = self.settings.values.get(name)
        if given is not None:
            self.ledger.take(check, given, reason)


def environment(exports: Exports) -> dict[str, str]:
    """All variables to add to the process environment: derived ones, and lines of `.env` that are not in it yet."""
    settings = exports.settings
    from_file = {
        name: value.text
        for name, value in settings.values.items()
        if name not in settings.given and name != "NOTIFY" and not name.startswith("PET_")
    }
    return dict(sorted({**from_file, **exports.env}.items()))


def keep_others(exports: Exports, host: Host) -> None:
    """Records the variables of NCCL, Gloo and torch that nothing was derived for. Some are the base image's, and some
    NCCL reads from its own files, where nothing else sets them."""
    for line in host.nccl_conf:
        ours = exports.env.get(line.name)
        if line.name not in exports.settings.values and ours is None:
            exports.ledger.decide("settings", line.name, line.text, line.source, "NCCL reads it there by itself")
        elif ours not in (None, line.text):
            exports.ledger.warn(
                "settings.nccl-conf-overridden",
                setting=line.name,
                name=line.name,
                text=line.text,
                source=line.source,
                ours=ours,
            )
    decided = {each.name for each in exports.ledger.decisions}
    for name in sorted(exports.settings.values):
        if name.startswith(LIBRARIES) and name not in decided:
            exports.keep("settings", name, "handed to the workers as it is")


def removals(settings: Settings, env: dict[str, str], ledger: Ledger) -> tuple[str, ...]:
    """Names to take out of the process environment: stray PET_* and empty variables of the libraries."""
    strays = sorted(name for name in {*settings.given, *settings.values} if name.startswith("PET_"))
    if strays:
        values = settings.values
        ledger.warn(
            "settings.stray-pet",
            setting=strays[0],
            strays=[f"{name} ({values[name].source if name in values else 'environment'})" for name in strays],
            one=len(strays) == 1,
        )
    workers = {setting.name for setting in TABLE if setting.scope == "worker"}
    empty = sorted(
        name
        for name in settings.given
        if name not in settings.values and name not in env and (name.startswith(LIBRARIES) or name in workers)
    )
    # The script need not know where the job's messages go.
    return (*strays, *empty, *({"NOTIFY"} & settings.given))


def common_exports(exports: Exports, host: Host, script: Script, ras_port: int, node_rank: int) -> None:
    """Variables that every launch gets, whatever the network."""
    records = f"{log_dir(script.run_dir, node_rank)}/flight_recorder_rank_"
    for name, value, reason in (
        ("NCCL_DEBUG", "WARN", "errors and warnings of NCCL; INFO for its choices"),
        ("NCCL_RAS_ADDR", f"localhost:{ras_port}", "one port per job: jobs on one machine must not share it"),
        (
            "TORCH_FR_DUMP_TEMP_FILE",
            records,
            "torch's record of the last collectives, written there when one times out",
        ),
        ("PYTHONUNBUFFERED", "1", "a worker's last line must not be lost in a buffer"),
    ):
        exports.offer("settings", name, value, reason)
    exports.keep("settings", "CUDA_LAUNCH_BLOCKING", "as you set it")
    exports.keep("rdma", "GLOO_IB_DISABLE", "accepted, without effect: no version of Gloo reads it")
    if script.home:
        _home_exports(exports, script.home, host)
    exports.env["LOG_BYTES"] = exports.settings.log_bytes.text
    exports.env["RUN_DIR"] = str(script.run_dir)
    exports.env["CHECKPOINT_DIR"] = str(script.checkpoint_dir)
    if script.command[:1] == ("-m",) and script.command[1:2] and script.command[1].startswith("app."):
        before = exports.settings.text("PYTHONPATH")
        exports.env["PYTHONPATH"] = f"{host.project}:{before}" if before else str(host.project)


def _home_exports(exports: Exports, home: Path, host: Host) -> None:
    """Everything that libraries keep follows HOME, but for compiled code, which is run unseen: each image and each node
    has its own, also where nodes share the folder."""
    exports.env["HOME"] = str(home)
    last = "caches and settings of libraries outlive the container there"
    exports.ledger.decide("script", "HOME", home, "derived", last)
    image = crc32(repr(sorted(host.packages.items())).encode())
    compiled = home / ".cache/compiled" / f"{host.hostname}-{image:08x}"
    own = "compiled code, of this node and image alone"
    for name, value, reason in (
        ("TORCHINDUCTOR_CACHE_DIR", compiled / "inductor", own),
        ("TORCH_EXTENSIONS_DIR", compiled / "extensions", own),
        ("TRITON_CACHE_DIR", compiled / "triton", own),
        ("CUDA_CACHE_PATH", compiled / "cuda", own),
        ("USER", "trainer", "tools ask for a name, and the image may know no user of this number"),
    ):
        exports.offer("script", name, value, reason)
