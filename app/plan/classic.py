"""Nodes without a list: one node alone, the classic variables (NNODES, NODE_RANK, MASTER_ADDR), or a scheduler."""

from app.config.envfile import Value
from app.config.settings import Settings
from app.host import Host
from app.host.addresses import family, is_loopback, parse
from app.plan.decisions import Ledger, shown
from app.plan.local import Own, local_addresses, loopback_interface, own_towards
from app.plan.node_list import NodeList, addresses_of, bare, malformed
from app.plan.schedulers import Scheduled, scheduled


def decide_classic(settings: Settings, host: Host, ledger: Ledger) -> NodeList | None:
    """Rank and nodes where NODES is unset; the nodes that nobody named are "" until the roll call."""
    rank, nnodes = settings.values.get("NODE_RANK"), settings.values.get("NNODES")
    job = None if rank is not None else scheduled(settings)
    if job is not None and job.wrong:
        ledger.refuse(job.rank.source, f"{job.wrong}.")
        return None
    count = nnodes or (job.nnodes if job else None)
    if count is None and rank is None and job is None and not _elsewhere(settings.values.get("MASTER_ADDR"), host):
        return _alone(host, ledger, Value(text="1", source="default"))
    if count is not None and int(count.text) == 1 and (rank is None or rank.text.strip("0+") == ""):
        return _alone(host, ledger, count)
    return _member(settings, host, ledger, job, rank, count)


def _elsewhere(master: Value | None, host: Host) -> bool:
    """Whether a master on another machine is named: then one node alone is not what was meant."""
    if master is None:
        return False
    addresses = addresses_of(bare(master.text), host)
    return not any(is_loopback(each) or each in local_addresses(host) for each in addresses)


def _alone(host: Host, ledger: Ledger, count: Value) -> NodeList:
    why = "NODES is not set" if count.source == "default" else f"NNODES={count.text}"
    ledger.decide("NODES", "127.0.0.1", count.source, f"{why}: one node, this machine alone")
    ledger.decide("NODE_RANK", 0, "derived", "the only node")
    ledger.decide("MASTER_ADDR", "127.0.0.1", "derived", "nothing leaves this machine")
    own = Own(address="127.0.0.1", interface=loopback_interface(host), reason="one node needs no network")
    return NodeList(names=("127.0.0.1",), addresses=("127.0.0.1",), rank=0, own=own)


def _member(
    settings: Settings, host: Host, ledger: Ledger, job: Scheduled | None, rank: Value | None, count: Value | None
) -> NodeList | None:
    master = settings.values.get("MASTER_ADDR") or (job.master if job else None)
    rank = rank or (job.rank if job else None)
    if master is not None and (wrong := malformed(bare(master.text))):
        ledger.refuse("MASTER_ADDR", f"{shown('MASTER_ADDR', master)} {wrong}.")
        return None
    if count is None or rank is None or master is None:
        _refuse_incomplete(ledger, rank, count, master, job)
        return None
    number, size = int(rank.text), int(count.text)
    if number >= size:
        ledger.refuse(
            "NODE_RANK",
            f"{shown('NODE_RANK', rank)}, but {shown('NNODES', count)}: ranks run from 0 to {size - 1}. "
            "Correct it, or list the nodes in NODES to have it found by address.",
        )
        return None
    address = _master_address(master, host, ledger)
    if address is None:
        return None
    how = f"from {job.scheduler}, since neither NODES nor NODE_RANK is set" if job else "as you set it"
    ledger.decide("NNODES", size, count.source, how if job and count.source != "environment" else "as you set it")
    ledger.decide("NODE_RANK", number, rank.source, how)
    ledger.decide("MASTER_ADDR", address, master.source, "node 0, which hosts torchrun's store")
    return _place(rank, size, address, master, host, ledger)


def _refuse_incomplete(
    ledger: Ledger, rank: Value | None, count: Value | None, master: Value | None, job: Scheduled | None
) -> None:
    given = {"NNODES": count, "NODE_RANK": rank, "MASTER_ADDR": master}
    missing = [name for name, value in given.items() if value is None]
    present = [shown(name, value) for name, value in given.items() if value is not None]
    by = f" (the rank is from {job.scheduler})" if job else ""
    ledger.refuse(
        missing[0],
        f"{', '.join(present)}{by}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. "
        f"Set NODES to the addresses of all nodes, the same on every node; or set {' and '.join(missing)}.",
    )


def _master_address(master: Value, host: Host, ledger: Ledger) -> str | None:
    addresses = addresses_of(bare(master.text), host)
    if addresses:
        return addresses[0]
    answer = host.answers.get(bare(master.text))
    failure = answer.failure if answer else "not looked up"
    ledger.refuse("MASTER_ADDR", f"{shown('MASTER_ADDR', master)} has no address here: {failure}. Write an address.")
    return None


def _place(rank: Value, size: int, master_address: str, master: Value, host: Host, ledger: Ledger) -> NodeList | None:
    number = int(rank.text)
    local = local_addresses(host)
    here = master_address in local
    if is_loopback(master_address) and family(master_address) == 4:
        # Several nodes on one machine: every address of 127/8 is local, so each node gets its own.
        address = str(parse(f"127.0.0.{int(master_address.rpartition('.')[2]) + number}") or master_address)
        own: Own | None = own_towards(host, address, (master_address,))
    elif number != 0 and here:
        ledger.refuse(
            "NODE_RANK",
            f"{shown('NODE_RANK', rank)}, but {shown('MASTER_ADDR', master)} is an address of this machine, so it is "
            "node 0. Correct one of the two.",
        )
        return None
    else:
        own = own_towards(host, master_address if number == 0 and here else None, (master_address,))
    if own is None:
        ledger.refuse("MASTER_ADDR", f"{shown('MASTER_ADDR', master)}: this machine has no address to reach it from.")
        return None
    if number == 0 and not here and not is_loopback(master_address):
        ledger.warn(
            f"{shown('MASTER_ADDR', master)} is not an address of this machine, although it is node 0. "
            "That is right behind address translation only."
        )
    nodes = [""] * size
    nodes[number] = own.address
    nodes[0] = master_address
    names = [*nodes]
    names[0] = master.text
    return NodeList(names=tuple(names), addresses=tuple(nodes), rank=number, own=own)
