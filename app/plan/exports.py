"""The environment that torchrun and the workers get. Whatever the user set stays as it is."""

from dataclasses import dataclass, field

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

    def offer(self, name: str, value: object, reason: str, rejected: tuple[str, ...] = ()) -> None:
        """Exports `value`, unless the user set the variable."""
        given = self.settings.values.get(name)
        if given is not None:
            same = given.text == str(value)
            why = f"as you set it; {reason}" if same else f"as you set it, in place of {value}"
            if given.source == COMPOSE:
                why = reason
            self.ledger.decide(name, given.text, given.source, why, rejected)
            return
        self.env[name] = str(value)
        self.ledger.decide(name, value, "derived", reason, rejected)

    def keep(self, name: str, reason: str) -> None:
        """Records a variable that is exported only because the user set it."""
        given = self.settings.values.get(name)
        if given is not None:
            self.ledger.take(name, given, reason)


def environment(settings: Settings, exports: Exports) -> dict[str, str]:
    """All variables to add to the process environment: derived ones, and lines of `.env` that are not in it yet."""
    from_file = {
        name: value.text
        for name, value in settings.values.items()
        if name not in settings.given and not name.startswith("PET_")
    }
    return dict(sorted({**from_file, **exports.env}.items()))


def keep_others(exports: Exports) -> None:
    """Records the variables of NCCL, Gloo and torch that nothing was derived for."""
    decided = {each.name for each in exports.ledger.decisions}
    for name in sorted(exports.settings.values):
        if name.startswith(LIBRARIES) and name not in decided:
            exports.keep(name, "as you set it, for the workers")


def removals(settings: Settings, env: dict[str, str], ledger: Ledger) -> tuple[str, ...]:
    """Names to take out of the process environment: stray PET_* and empty variables of the libraries."""
    strays = sorted(name for name in {*settings.given, *settings.values} if name.startswith("PET_"))
    if strays:
        values = settings.values
        named = [f"{name} ({values[name].source if name in values else 'environment'})" for name in strays]
        them = "it" if len(strays) == 1 else "them"
        ledger.warn(
            f"{', '.join(named)} removed from the environment: torchrun would read {them} as its own options. Use the "
            "settings of .env.example instead."
        )
    workers = {setting.name for setting in TABLE if setting.scope == "worker"}
    empty = sorted(
        name
        for name in settings.given
        if name not in settings.values and name not in env and (name.startswith(LIBRARIES) or name in workers)
    )
    return (*strays, *empty)


def common_exports(exports: Exports, host: Host, script: Script, ras_port: int, node_rank: int) -> None:
    """Variables that every launch gets, whatever the network."""
    exports.offer("NCCL_DEBUG", "WARN", "errors and warnings of NCCL; INFO for its choices")
    exports.offer("NCCL_RAS_ADDR", f"localhost:{ras_port}", "one port per job: jobs on one machine must not share it")
    exports.offer(
        "TORCH_FR_DUMP_TEMP_FILE",
        f"{log_dir(script.run_dir, node_rank)}/flight_recorder_rank_",
        "torch's record of the last collectives, written there when one times out",
    )
    exports.offer("PYTHONUNBUFFERED", "1", "a worker's last line must not be lost in a buffer")
    exports.keep("CUDA_LAUNCH_BLOCKING", "as you set it")
    exports.keep("GLOO_IB_DISABLE", "accepted, without effect: no version of Gloo reads it")
    exports.env["RUN_DIR"] = str(script.run_dir)
    exports.env["CHECKPOINT_DIR"] = str(script.checkpoint_dir)
    if script.command[:1] == ("-m",) and script.command[1:2] and script.command[1].startswith("app."):
        before = exports.settings.values.get("PYTHONPATH")
        exports.env["PYTHONPATH"] = str(host.project) + (f":{before.text}" if before else "")
