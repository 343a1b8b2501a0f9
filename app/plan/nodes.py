"""JobNodes from a list: which entry of NODES this machine is, by its addresses or by NODE_RANK."""

from app.config.problems import count
from app.config.settings import Settings, refused
from app.config.values import Value
from app.host import Host
from app.host.addresses import canonical, family, is_loopback, parse
from app.plan.decisions import Ledger
from app.plan.local import listing, local_addresses, own_towards
from app.plan.node_list import NodeList, addresses_of, malformed, unresolved

Written = Value[tuple[str, ...]]


def decide_listed(written: Written, settings: Settings, host: Host, ledger: Ledger) -> NodeList | None:
    """JobNodes, rank and this node's own address; None with a problem in the ledger if they cannot be known."""
    names = written.value
    before = len(ledger.problems)
    _check_entries(written, host, ledger)
    _check_count(names, settings, ledger)
    if len(ledger.problems) > before:
        return None
    candidates = [addresses_of(name, host) for name in names]
    nodes = _one_family(candidates, written, host, ledger)
    if nodes is None or not _distinct(nodes, written, ledger):
        return None
    ledger.decide("rank", "NODES", ",".join(nodes), written.source, f"{count(len(nodes), 'node')} in rank order")
    _check_master(nodes, candidates, settings, host, ledger)
    rank = _rank(nodes, written, settings, host, ledger)
    if rank is None:
        return None
    own = own_towards(host, nodes[rank], nodes)
    if own is None:
        ledger.refuse("network.no-address", given=written)
        return None
    source = settings.node_rank.source if settings.node_rank else "detected"
    return NodeList(names=names, addresses=nodes, rank=rank, rank_source=source, own=own)


def _check_entries(written: Written, host: Host, ledger: Ledger) -> None:
    if not written.value:
        ledger.refuse("rank.no-nodes", given=written)
    seen: dict[str, int] = {}
    for index, name in enumerate(written.value):
        key = canonical(name).lower()
        if wrong := malformed(name):
            ledger.problems.append(refused(wrong, written, "rank"))
        elif not addresses_of(name, host):
            ledger.problems.append(refused(unresolved(name, host), written, "names"))
        elif key in seen:
            _refuse_twice(seen[key], index, written, ledger)
        seen.setdefault(key, index)


def _refuse_twice(first: int, second: int, written: Written, ledger: Ledger) -> None:
    entry, other = written.value[first], written.value[second]
    ledger.refuse("rank.node-twice", given=written, first=first, entry=entry, second=second, other=other)


def _check_count(names: tuple[str, ...], settings: Settings, ledger: Ledger) -> None:
    nnodes = settings.nnodes
    if nnodes is not None and names and nnodes.value != len(names):
        ledger.refuse("rank.nnodes-differs", given=nnodes, nodes=len(names))


def _one_family(
    candidates: list[tuple[str, ...]], written: Written, host: Host, ledger: Ledger
) -> tuple[str, ...] | None:
    local = local_addresses(host)
    for version in (4, 6):
        fitting = [[each for each in addresses if family(each) == version] for addresses in candidates]
        if all(fitting):
            chosen = [next((each for each in addresses if each in local), addresses[0]) for addresses in fitting]
            return _without_loopback(tuple(chosen), written, host, ledger)
    ledger.refuse("rank.mixed-families", given=written)
    return None


def _distinct(nodes: tuple[str, ...], written: Written, ledger: Ledger) -> bool:
    for index, address in enumerate(nodes):
        first = nodes.index(address)
        if first != index:
            _refuse_twice(first, index, written, ledger)
            return False
    return True


def _without_loopback(nodes: tuple[str, ...], written: Written, host: Host, ledger: Ledger) -> tuple[str, ...] | None:
    """A machine's own name often stands for 127.0.1.1 in its /etc/hosts: find the address that the others use."""
    loops = [index for index, address in enumerate(nodes) if is_loopback(address)]
    if not loops or len(loops) == len(nodes):
        return nodes
    index = loops[0]
    entry, loopback = written.value[index], nodes[index]
    own = own_towards(host, None, tuple(address for address in nodes if not is_loopback(address)))
    if own is None or parse(entry) is not None or len(loops) > 1:
        ledger.refuse("names.loopback", given=written, entry=entry, loopback=loopback)
        return None
    ledger.warn("names.own-name-is-loopback", setting="NODES", entry=entry, loopback=loopback, address=own.address)
    return (*nodes[:index], own.address, *nodes[index + 1 :])


def _check_master(
    nodes: tuple[str, ...], candidates: list[tuple[str, ...]], settings: Settings, host: Host, ledger: Ledger
) -> None:
    master = settings.master_addr
    if master is None:
        ledger.decide("rank", "MASTER_ADDR", nodes[0], "derived", "the first of NODES hosts torchrun's store")
        return
    if wrong := malformed(master.value):
        ledger.problems.append(refused(wrong, master, "rank"))
        return
    if {canonical(master.value), *addresses_of(master.value, host)} & {nodes[0], *candidates[0]}:
        ledger.decide("rank", "MASTER_ADDR", nodes[0], master.source, "node 0, as you set it")
        return
    ledger.refuse("rank.master-not-node-0", given=master, node0=nodes[0])


def _rank(nodes: tuple[str, ...], written: Written, settings: Settings, host: Host, ledger: Ledger) -> int | None:
    local = local_addresses(host)
    matches = [index for index, address in enumerate(nodes) if address in local or is_loopback(address)]
    if settings.node_rank is not None:
        return _given_rank(settings.node_rank, nodes, matches, host, ledger)
    if len(matches) == 1:
        rank = matches[0]
        interface = "lo" if is_loopback(nodes[rank]) else local[nodes[rank]].name
        reason = f"{nodes[rank]} on {interface} is entry {rank} of NODES (counted from 0)"
        ledger.decide("rank", "NODE_RANK", rank, "detected", reason)
        return rank
    ledger.refuse(
        "rank.several-match"
        if matches
        else "rank.inside-wsl"
        if host.inside == "wsl"
        else "rank.inside-desktop"
        if host.inside == "desktop"
        else "rank.inside-rootless"
        if host.inside == "rootless"
        else "rank.none-matches",
        details=listing(host, nodes),
        given=written,
        number=len(matches),
        ranks=" or ".join(map(str, matches)),
        last=len(nodes) - 1,
    )
    return None


def _given_rank(
    given: Value[int], nodes: tuple[str, ...], matches: list[int], host: Host, ledger: Ledger
) -> int | None:
    rank = given.value
    if rank >= len(nodes):
        ledger.refuse(
            "rank.too-high", given=given, size=f"NODES lists {count(len(nodes), 'node')}", last=len(nodes) - 1
        )
        return None
    if rank in matches:
        ledger.take("rank", given, f"as you set it; {nodes[rank]} is an address of this machine")
        return rank
    if matches:
        ledger.refuse(
            "rank.not-this-node",
            given=given,
            address=nodes[rank],
            own=[f"{nodes[index]} (node {index})" for index in matches],
        )
        return None
    ledger.take("rank", given, f"as you set it; {nodes[rank]} is not an address of this machine")
    ledger.warn("rank.unchecked", details=listing(host, nodes), given=given)
    return rank
