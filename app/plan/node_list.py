"""The nodes of a job as one of them sees them, and the entries that users write for them."""

import re
from dataclasses import dataclass

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
    own: Own


def listed(text: str) -> tuple[str, ...]:
    """The entries of NODES: commas, spaces or line ends between them, comments from # on."""
    without_comments = re.sub(r"#[^\n]*", "", text)
    return tuple(bare(entry) for entry in re.split(r"[,;\s]+", without_comments) if entry)


def bare(text: str) -> str:
    """`fd00::1` of `[fd00::1]`; anything else as it is."""
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def names_to_resolve(settings: Settings) -> tuple[str, ...]:
    """Host names in NODES and MASTER_ADDR, for `probe` to look up."""
    found = [*listed(settings.text("NODES"))]
    master = settings.get("MASTER_ADDR")
    if master is None and not found:
        job = scheduled(settings)
        master = job.master if job else None
    if master is not None:
        found.append(bare(master.text))
    return tuple(dict.fromkeys(name for name in found if parse(name) is None and not malformed(name)))


def malformed(name: str) -> str | None:
    """What is wrong with an entry of NODES or with MASTER_ADDR, as the end of a sentence; None if it can be a node."""
    if is_link_local(name):
        return "is a link-local address, which only says something together with an interface: use a global one"
    if names_no_machine(name):
        return "names no machine: write the node's own address"
    if parse(name) is not None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+){3}", name) and re.search(r"\b0[0-9]", name):
        return "has a leading zero, which may mean octal: write it without"
    if re.fullmatch(r"[0-9.]+", name):
        return "is not a complete IPv4 address"
    if re.fullmatch(r"\[?[0-9A-Za-z_.:-]+\]?:[0-9]+", name):
        return "has a port: write the address alone, the port is MASTER_PORT"
    if not re.fullmatch(r"[0-9A-Za-z_]([0-9A-Za-z_.-]{0,252})", name):
        return "is neither an address nor a host name"
    return None


def addresses_of(name: str, host: Host) -> tuple[str, ...]:
    """All addresses of an entry: itself, or what the name resolves to here."""
    if parse(name) is not None:
        return (canonical(name),)
    answer = host.answers.get(name)
    return () if answer is None else answer.addresses
