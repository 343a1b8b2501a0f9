"""All that the checks of one node go by."""

from dataclasses import dataclass, field

from app.doctor.collect.live import LiveFacts
from app.host import Host
from app.host.nics import Nic
from app.plan import Draft, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    host: Host
    draft: Draft
    live: LiveFacts
    secrets: tuple[str, ...] = field(repr=False, default=())
    """Of this node's user, told to nobody."""

    @property
    def plan(self) -> Plan | None:
        return self.draft.plan

    @property
    def nic(self) -> Nic | None:
        """The interface that carries this node's address."""
        return next((nic for nic in self.host.nics if self.plan and nic.name == self.plan.network.interface), None)
