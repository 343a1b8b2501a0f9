"""How a torchrun and its workers ended, or that they stand still: plain data for gang, supervise and report."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What one worker, or torchrun itself (`rank` -1), died of."""

    rank: int
    exitcode: int
    """As subprocess has it: negative is the signal."""
    text: str = ""
    """The exception's first line, or "" when it left none."""
    time: float = 0.0
    """Seconds since the epoch, on the clock of its node."""
    local_rank: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What its own node knows of a failure."""

    words: str = ""
    """The exception, or where it left none the last error in its log."""
    note: str = ""
    """What is known of a signal: that the kernel killed for memory."""
    place: str = ""
    """`File "train.py", line 5, in step`."""
    cause: str = ""
    fix: str = ""
    """Of a known error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one torchrun ended. `failures` is empty when its workers ended well or were told to end."""

    code: int
    failures: tuple[Failure, ...] = ()
    """The first cause on this node first; those that torchrun itself ended afterwards are among them."""
    halted: bool = False
    """It had been told to end before the first of them failed."""
    finished: bool = False
    """All its workers had ended with 0 before it was told to end."""


@dataclass(slots=True, kw_only=True)
class Moments:
    """When what happened to one torchrun, in seconds since the epoch; 0 for what was not seen."""

    launched: float
    begun: float = 0.0
    """All its workers run."""
    died: float = 0.0
    """Its first worker that failed."""
    told: float = 0.0
    """The launcher knew, or had its workers end because of another node."""
    ended: float = 0.0
    """Nothing of it was left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One that a rank has entered, as torch's flight recorder has it."""

    name: str
    sequence: int
    """Its number in its group."""
    group: str = "default_pg"
    data: str = ""
    """What the rank put in: `float32[10]`."""
    done: bool = False

    @property
    def default_group(self) -> bool:
        return self.group.endswith("default_pg")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """One rank that makes no progress, or has ended while others may wait for it."""

    rank: int
    seconds: int
    """For how long, when it was told."""
    at: str
    """`train.py:18, in train: dist.all_reduce(loss)`: the script's own line; "" of one that has ended."""
    entered: tuple[Collective, ...] = ()
    """The last ones, of all groups, oldest first."""
    run_id: str = ""
    """Of its round, "" where that is not known."""
    ended: bool = False
    time: float = 0.0
    """When it ended, seconds since the epoch."""
