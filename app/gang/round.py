"""One round of the gang as node 0 follows it: who still runs, who must be told to end, and what went wrong."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from signal import SIGABRT

from app.config.exitcodes import ExitCode
from app.engine.outcome import Stall
from app.gang.messages import Event, Say
from app.gang.stalls import describe, is_blocked, is_free
from app.gang.verdict import THE_JOB, JobEnded, NodeFailure, Weight, left_alone, worker_failure

HALT_GRACE = 2.0
"""Seconds that workers have to end after another node failed; their collectives cannot finish any more."""


@dataclass(slots=True, kw_only=True)
class RoundState:
    """`take` every event of the round in order until nobody is `running`, then read the `result`."""

    names: Mapping[int, str]
    """The nodes of the round by rank, as shown."""
    stop_grace: float
    patience: float
    """Seconds beyond the grace after which a node that does not end is given up."""
    hang_report: float
    """Seconds that a rank stands still until its node tells it; whoever waited for a node that has ended needs as
    long to take that back."""
    hang_timeout: float
    """Seconds without progress until that is a failure; 0 for never."""
    halt: Callable[[str, float, str], None]
    """Tells all nodes to end: ("failure", "stop" or "grow", grace in seconds, reason)."""
    tell: Say
    """Prints on all nodes."""
    running: set[int] = field(default_factory=set)
    limit: float = float("inf")
    """Monotonic time at which those that still run are given up."""
    halted_at: float = 0.0
    """Monotonic time at which the nodes were told to end; 0 before."""
    failures: list[NodeFailure] = field(default_factory=list)
    stopped_by: str = ""
    _first_signs: dict[int, float] = field(default_factory=dict)
    _finished: dict[str, str] = field(default_factory=dict)
    _codes: dict[int, int] = field(default_factory=dict)
    _halted: set[str] = field(default_factory=set)
    _stalls: dict[int, tuple[Stall, ...]] = field(default_factory=dict)
    _unsure_until: float = 0.0
    """Monotonic time until which a stall may be of before a node's end."""
    _stalled_since: float = 0.0
    """Monotonic time since which no rank of any node makes progress; 0 while one does."""
    _hung: NodeFailure | None = None
    """No rank made progress when the first worker failed."""
    _blocked: frozenset[int] = frozenset()
    """The ranks that were blocked in a collective then."""

    def __post_init__(self) -> None:
        self.running = set(self.names)

    def take(self, event: Event, now: float) -> None:
        node = self.names.get(event.rank, f"node {event.rank}")
        if event.kind == "stop":
            # Also by a node that waits for the next round.
            self.stopped_by = self.stopped_by or node
            self._end("stop", self.stop_grace, f"stopped on {node}", now)
        elif event.rank not in self.names:
            return
        elif event.kind == "failing":
            self._first_signs.setdefault(event.rank, now)
            self._remember_hang()
            self._end("failure", HALT_GRACE, f"a worker on {node} failed (details follow)", now)
        elif event.kind == "stalled":
            self._stalls[event.rank] = event.stalls
            self._judge(now)
        elif event.rank in self.running and event.kind in ("lost", "ended"):
            self.running.discard(event.rank)
            self._close(event, node, now)

    def _judge(self, now: float) -> None:
        """Says once that no rank of the job makes progress, and why; and that it goes on, if it does."""
        stalls = {rank: self._stalls.get(rank, ()) for rank in self.running}
        seconds = [stall.seconds for each in stalls.values() for stall in each if not stall.ended]
        stands = all(stalls.values()) and now >= self._unsure_until and not self._nobody_waits(stalls)
        if stands and seconds and not self._stalled_since and not self.halted_at:
            self._stalled_since = now - min(seconds)
            self.tell(self.hang)
        elif self._stalled_since and not stands:
            self._stalled_since = 0.0
            if not self.halted_at:
                self.tell("progress resumed")

    def _nobody_waits(self, stalls: Mapping[int, Sequence[Stall]]) -> bool:
        """Some have finished, and those that are left have done all collectives that they entered: whoever rests then
        keeps nobody."""
        each = [stall for some in stalls.values() for stall in some]
        left = [stall for stall in each if not stall.ended]
        return (len(left) < len(each) or self.running < self.names.keys()) and all(is_free(stall) for stall in left)

    @property
    def stands(self) -> bool:
        """No rank of the job makes progress."""
        return self._stalled_since > 0

    @property
    def hang(self) -> str:
        """Who waits for whom, as far as the nodes have told."""
        told = describe({self.names[rank]: each for rank, each in sorted(self._stalls.items()) if each})
        ended = [self.names[rank] for rank in sorted(self.names.keys() - self.running)]
        return told + "".join(f"; {node} had finished{self._after(node)}" for node in ended)

    def _after(self, node: str) -> str:
        return f" after {self._finished[node]}" if node in self._finished else ""

    def grow(self, reason: str, now: float) -> None:
        """Ends the round for another with more nodes, unless it ends already."""
        if not self.halted_at:
            self._end("grow", self.stop_grace, reason, now)

    def check_hang(self, now: float) -> None:
        """Ends a round without progress for HANG_TIMEOUT. To be called again and again."""
        self._judge(now)
        if (
            self._stalled_since
            and self.hang_timeout
            and now >= self._stalled_since + self.hang_timeout
            and not self.halted_at
        ):
            self.failures.append(self._hang_failure("hangs"))
            self._end("failure", HALT_GRACE, f"the job hangs (HANG_TIMEOUT={self.hang_timeout:g})", now)

    def _hang_failure(self, how: str) -> NodeFailure:
        return NodeFailure(node=THE_JOB, what=f"{how}: {self.hang}", seen=self._stalled_since, abrupt=True)

    def _remember_hang(self) -> None:
        """What a blocked rank dies of, torch's time-out for one, is a consequence; its stall is withdrawn by then."""
        if self._stalled_since and not self._hung and not self.halted_at:
            self._hung = self._hang_failure("hung")
            self._blocked = frozenset(
                stall.rank for each in self._stalls.values() for stall in each if is_blocked(stall)
            )

    def _close(self, event: Event, node: str, now: float) -> None:
        if event.kind == "lost":
            self.failures.append(lost(event, node, now))
            # Whose link it was that went silent is not known yet.
            self._end("failure", HALT_GRACE, f"{node} {'is not heard any more' if event.silent else 'was lost'}", now)
            return
        self._codes[event.rank] = event.code
        if event.finished:
            self._finished[node] = event.finished
        if event.report:
            failure = worker_failure(node, event.report, self._first_signs.get(event.rank, now))
            by_itself = event.report.exitcode > 0 or event.report.exitcode == -SIGABRT
            if self._hung and event.report.rank in self._blocked and by_itself:
                failure = replace(failure, weight=max(failure.weight, Weight.CONSEQUENCE))
                self.failures += [self._hung] if self._hung not in self.failures else []
            self.failures.append(failure)
        if event.code:
            self._end("failure", HALT_GRACE, f"{node} failed", now)
        else:
            self._stalls.pop(event.rank, None)
            self._unsure_until = now + self.hang_report
            self._judge(now)

    def _end(self, why: str, grace: float, reason: str, now: float) -> None:
        # Whoever fails after it was told to end does so because of that; a user's stop still counts.
        if not self._halted or (why == "stop" and "stop" not in self._halted):
            self._halted.add(why)
            self.halted_at, self.limit = now, now + grace + self.patience
            self.halt(why, grace, reason)

    def give_up(self, now: float) -> None:
        """Counts those that still run after `limit` as failed."""
        stuck = [NodeFailure(node=self.names[rank], what="does not end", seen=now) for rank in sorted(self.running)]
        self.failures += stuck
        self.running.clear()

    def result(self) -> Sequence[NodeFailure]:
        """What went wrong; nothing where the round ended to let others in. Raises JobEnded when all ended well or the
        user stopped the job."""
        grown = "grow" in self._halted and not self.stopped_by
        if grown and all(each.weight == Weight.FOLLOWED for each in self.failures):
            return []
        if self._codes.keys() == self.names.keys() and not any(self._codes.values()):
            nodes = f"{len(self.names)} nodes" if len(self.names) > 1 else "this node"
            raise JobEnded(ExitCode.DONE, f"done: all workers of {nodes} ended well")
        if self.stopped_by:
            raise JobEnded(ExitCode.STOPPED, f"stopped on {self.stopped_by} before the training was done")
        nobody = NodeFailure(node="torchrun", what="ended without saying why", seen=time.monotonic())
        return left_alone(self.failures, self._finished) or [nobody]


def lost(event: Event, node: str, now: float) -> NodeFailure:
    return NodeFailure(
        node=node,
        what=f"was lost: {event.why}",
        seen=now,
        clock=time.time(),
        code=ExitCode.LOST,
        abrupt=True,
        silent=event.silent,
    )
