"""The nodes of a job as one of them sees them, and the entries that users write for them."""

import re
from dataclasses import dataclass

from app.config.parsers import Malformed
from app.config.settings import Settings
from app.host import Host
from app.host.addresses import canonical, is_link_local, names_no_machine, parse
from app.plan.local import Own
from app.plan.schedulers import scheduled


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeList:
    """The job's nodes as this node sees them."""

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    """Literal addresses in rank order; "" where only the roll call can tell."""
    rank: int
    rank_source: str
    own: Own


def names_to_resolve(settings: Settings) -> tuple[str, ...]:
    """Host names in NODES and MASTER_ADDR, for `probe` to look up."""
    found = list(settings.nodes.value) if settings.nodes else []
    master = settings.master_addr
    if master is None and not found:
        job = scheduled(settings)
        master = job.master if job else None
    if master is not None:
        found.append(master.value)
    return tuple(dict.fromkeys(name for name in found if parse(name) is None and not malformed(name)))


def malformed(name: str) -> Malformed | None:
    """What is wrong with an entry of NODES or with MASTER_ADDR; None if it can be a node."""
    if is_link_local(name):
        return Malformed("node-link-local", entry=name)
    if names_no_machine(name):
        return Malformed("node-no-machine", entry=name)
    if parse(name) is not None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+){3}", name) and re.search(r"\b0[0-9]", name):
        return Malformed("node-leading-zero", entry=name)
    if re.fullmatch(r"[0-9.]+", name):
        return Malformed("node-incomplete", entry=name)
    if re.fullmatch(r"\[?[0-9A-Za-z_.:-]+\]?:[0-9]+", name):
        return Malformed("node-with-port", entry=name)
    if not re.fullmatch(r"[0-9A-Za-z_]([0-9A-Za-z_.-]{0,252})", name):
        return Malformed("node-no-name", entry=name)
    return None


def addresses_of(name: str, host: Host) -> tuple[str, ...]:
    """All addresses of an entry: itself, or what the name resolves to here."""
    if parse(name) is not None:
        return (canonical(name),)
    answer = host.answers.get(name)
    return () if answer is None else answer.addresses


def unresolved(name: str, host: Host) -> Malformed:
    """What the resolver said of a name without an address."""
    answer = host.answers.get(name)
    return Malformed("node-unresolved", entry=name, why=answer.failure if answer is not None else "not looked up")
