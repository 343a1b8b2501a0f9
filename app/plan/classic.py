"""JobNodes without a list: one node alone, the classic variables (NNODES, NODE_RANK, MASTER_ADDR), or a scheduler."""

from typing import Any

from app.config.settings import Settings, refused
from app.config.values import Value
from app.host import Host
from app.host.addresses import family, is_loopback, parse
from app.plan.decisions import Ledger
from app.plan.local import Own, local_addresses, loopback_interface, own_towards
from app.plan.node_list import NodeList, addresses_of, malformed, unresolved
from app.plan.schedulers import Scheduled, scheduled


def decide_classic(settings: Settings, host: Host, ledger: Ledger) -> NodeList | None:
    """Rank and nodes where NODES is unset; the nodes that nobody named are "" until the roll call."""
    rank = settings.node_rank
    job = None if rank is not None else scheduled(settings)
    if job is not None and job.several:
        given, option = job.several
        ledger.refuse("rank.scheduler-several", setting=job.rank.source, given=given, option=option)
        return None
    count = settings.nnodes or (job.nnodes if job else None)
    if count is None and rank is None and job is None and not _elsewhere(settings.master_addr, host):
        return _alone(host, ledger, Value(name="NNODES", text="1", source="default", value=1))
    if count is not None and count.value == 1 and (rank is None or rank.value == 0):
        return _alone(host, ledger, count)
    return _several(settings, host, ledger, job, count)


def _elsewhere(master: Value[str] | None, host: Host) -> bool:
    """Whether a master on another machine is named: then one node alone is not what was meant."""
    if master is None:
        return False
    addresses = addresses_of(master.value, host)
    return not any(is_loopback(each) or each in local_addresses(host) for each in addresses)


def _alone(host: Host, ledger: Ledger, count: Value[int]) -> NodeList:
    why = "NODES is not set" if count.source == "default" else f"NNODES={count.text}"
    ledger.decide("rank", "NODES", "127.0.0.1", count.source, f"{why}: one node, this machine alone")
    ledger.decide("rank", "NODE_RANK", 0, "derived", "the only node")
    ledger.decide("rank", "MASTER_ADDR", "127.0.0.1", "derived", "nothing leaves this machine")
    own = Own(address="127.0.0.1", interface=loopback_interface(host), reason="one node needs no network")
    here = ("127.0.0.1",)
    return NodeList(names=here, addresses=here, rank=0, rank_source="derived", own=own)


def _several(
    settings: Settings, host: Host, ledger: Ledger, job: Scheduled | None, count: Value[int] | None
) -> NodeList | None:
    master = settings.master_addr or (job.master if job else None)
    rank = settings.node_rank or (job.rank if job else None)
    if master is not None and (wrong := malformed(master.value)):
        ledger.problems.append(refused(wrong, master, "rank"))
        return None
    if count is None or rank is None or master is None:
        _refuse_incomplete(ledger, {"NNODES": count, "NODE_RANK": rank, "MASTER_ADDR": master}, job)
        return None
    if rank.value >= count.value:
        ledger.refuse("rank.too-high", given=rank, size=count, last=count.value - 1)
        return None
    addresses = addresses_of(master.value, host)
    if not addresses:
        ledger.problems.append(refused(unresolved(master.value, host), master, "names"))
        return None
    given = "as you set it"
    how = f"from {job.scheduler}, since neither NODES nor NODE_RANK is set" if job else given
    ledger.decide("rank", "NNODES", count.value, count.source, given if count is settings.nnodes else how)
    ledger.decide("rank", "NODE_RANK", rank.value, rank.source, how)
    ledger.decide("rank", "MASTER_ADDR", addresses[0], master.source, "node 0, which hosts torchrun's store")
    return _placed(rank, count.value, addresses[0], master, host, ledger)


def _refuse_incomplete(ledger: Ledger, given: dict[str, Value[Any] | None], job: Scheduled | None) -> None:
    missing = [name for name, value in given.items() if value is None]
    by = f" (the rank is from {job.scheduler})" if job else ""
    ledger.refuse(
        "rank.incomplete",
        setting=missing[0],
        present=[value for value in given.values() if value is not None],
        by=by,
        missing=" and ".join(missing),
        one=len(missing) == 1,
    )


def _placed(
    rank: Value[int], size: int, master_address: str, master: Value[str], host: Host, ledger: Ledger
) -> NodeList | None:
    here = master_address in local_addresses(host)
    if rank.value and here:
        ledger.refuse("rank.master-is-this-node", given=rank, master=master)
        return None
    own = _own(rank.value, master_address, here, host)
    if own is None:
        ledger.refuse("network.no-address", given=master)
        return None
    if rank.value == 0 and not here and not is_loopback(master_address):
        ledger.warn("rank.master-not-here", master=master)
    nodes = [""] * size
    nodes[rank.value] = own.address
    nodes[0] = master_address
    names = (master.text, *nodes[1:])
    return NodeList(names=names, addresses=tuple(nodes), rank=rank.value, rank_source=rank.source, own=own)


def _own(rank: int, master_address: str, here: bool, host: Host) -> Own | None:
    if is_loopback(master_address) and family(master_address) == 4:
        # Several nodes on one machine: every address of 127/8 is local, so each node gets its own.
        last = int(master_address.rpartition(".")[2]) + rank
        return own_towards(host, str(parse(f"127.0.0.{last}") or master_address), (master_address,))
    return own_towards(host, master_address if here else None, (master_address,))
