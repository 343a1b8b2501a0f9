"""Nodes from a list: which entry of NODES this machine is, by its addresses or by NODE_RANK."""

from app.config.envfile import Value
from app.config.errors import printable
from app.config.settings import Settings
from app.host import Host
from app.host.addresses import canonical, family, is_loopback, parse
from app.plan.decisions import Ledger, count, shown
from app.plan.local import listing, local_addresses, own_towards
from app.plan.node_list import NodeList, addresses_of, bare, listed, malformed


def decide_listed(written: Value, settings: Settings, host: Host, ledger: Ledger) -> NodeList | None:
    """Nodes, rank and this node's own address; None with a problem in the ledger if they cannot be known."""
    names = listed(written.text)
    before = len(ledger.problems)
    _check_entries(names, written, host, ledger)
    _check_count(names, settings, ledger)
    if len(ledger.problems) > before:
        return None
    candidates = [addresses_of(name, host) for name in names]
    nodes = _one_family(names, candidates, written, host, ledger)
    if nodes is None or not _distinct(names, nodes, written, ledger):
        return None
    ledger.decide("NODES", ",".join(nodes), written.source, f"{count(len(nodes), 'node')} in rank order")
    _check_master(nodes, candidates, settings, host, ledger)
    rank = _rank(nodes, written, settings, host, ledger)
    if rank is None:
        return None
    own = own_towards(host, nodes[rank], nodes)
    if own is None:
        ledger.refuse("NODES", f"{shown('NODES', written)}: this machine has no network address to reach them from.")
        return None
    return NodeList(names=names, addresses=nodes, rank=rank, own=own)


def _check_entries(names: tuple[str, ...], written: Value, host: Host, ledger: Ledger) -> None:
    if not names:
        ledger.refuse("NODES", f"{shown('NODES', written)} names no node. Write addresses separated by commas.")
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        key = canonical(name).lower()
        wrong = malformed(name)
        answer = host.answers.get(name)
        if wrong is None and parse(name) is None and (answer is None or not answer.addresses):
            failure = answer.failure if answer is not None else "not looked up"
            wrong = f"has no address here ({failure}): write its address, or add it to DNS or /etc/hosts"
        if wrong is None and key in seen:
            wrong = f"is listed twice, as node {seen[key]} and node {index}: list each node once"
        if wrong is not None:
            ledger.refuse("NODES", f"{shown('NODES', written)}: {printable(name)} {wrong}.")
        seen.setdefault(key, index)


def _check_count(names: tuple[str, ...], settings: Settings, ledger: Ledger) -> None:
    nnodes = settings.values.get("NNODES")
    if nnodes is not None and names and int(nnodes.text) != len(names):
        ledger.refuse(
            "NNODES",
            f"{shown('NNODES', nnodes)}, but NODES lists {count(len(names), 'node')}. Remove NNODES: the list decides.",
        )


def _one_family(
    names: tuple[str, ...], candidates: list[tuple[str, ...]], written: Value, host: Host, ledger: Ledger
) -> tuple[str, ...] | None:
    local = local_addresses(host)
    for version in (4, 6):
        fitting = [[each for each in addresses if family(each) == version] for addresses in candidates]
        if not all(fitting):
            continue
        chosen = [next((each for each in addresses if each in local), addresses[0]) for addresses in fitting]
        return _without_loopback(names, tuple(chosen), written, host, ledger)
    ledger.refuse(
        "NODES",
        f"{shown('NODES', written)} mixes IPv4 and IPv6; Gloo and torch need one family. List all nodes in the same.",
    )
    return None


def _distinct(names: tuple[str, ...], nodes: tuple[str, ...], written: Value, ledger: Ledger) -> bool:
    for index, address in enumerate(nodes):
        first = nodes.index(address)
        if first != index:
            ledger.refuse(
                "NODES",
                f"{shown('NODES', written)}: {names[first]} and {names[index]} are both {address}. List each node "
                "once, by an address of its own.",
            )
            return False
    return True


def _without_loopback(
    names: tuple[str, ...], nodes: tuple[str, ...], written: Value, host: Host, ledger: Ledger
) -> tuple[str, ...] | None:
    """A machine's own name often stands for 127.0.1.1 in its /etc/hosts: find the address that the others use."""
    loops = [index for index, address in enumerate(nodes) if is_loopback(address)]
    if not loops or len(loops) == len(nodes):
        return nodes
    others = [address for address in nodes if not is_loopback(address)]
    found = list(nodes)
    for index in loops:
        own = own_towards(host, None, tuple(others))
        if own is None or parse(names[index]) is not None or len(loops) > 1:
            ledger.refuse(
                "NODES",
                f"{shown('NODES', written)}: {names[index]} is {nodes[index]} here, which the other nodes cannot "
                "reach. Write its address in the nodes' network instead.",
            )
            return None
        ledger.warn(
            f"{names[index]} is {nodes[index]} on this machine (a line in /etc/hosts); its address towards the other "
            f"nodes, {own.address}, is used instead. Listing addresses in NODES avoids the guess."
        )
        found[index] = own.address
    return tuple(found)


def _check_master(
    nodes: tuple[str, ...], candidates: list[tuple[str, ...]], settings: Settings, host: Host, ledger: Ledger
) -> None:
    master = settings.values.get("MASTER_ADDR")
    if master is None:
        ledger.decide("MASTER_ADDR", nodes[0], "derived", "the first of NODES hosts torchrun's store")
        return
    name = bare(master.text)
    if wrong := malformed(name):
        ledger.refuse("MASTER_ADDR", f"{shown('MASTER_ADDR', master)} {wrong}.")
        return
    if {canonical(name), *addresses_of(name, host)} & {nodes[0], *candidates[0]}:
        ledger.decide("MASTER_ADDR", nodes[0], master.source, "node 0, as you set it")
        return
    ledger.refuse(
        "MASTER_ADDR",
        f"{shown('MASTER_ADDR', master)} is not node 0, which is {nodes[0]} by NODES. "
        "Remove MASTER_ADDR, or put that node first in NODES on every node.",
    )


def _rank(nodes: tuple[str, ...], written: Value, settings: Settings, host: Host, ledger: Ledger) -> int | None:
    local = local_addresses(host)
    matches = [index for index, address in enumerate(nodes) if address in local or is_loopback(address)]
    given = settings.values.get("NODE_RANK")
    if given is not None:
        return _given_rank(given, nodes, matches, host, ledger)
    if len(matches) == 1:
        rank = matches[0]
        interface = "lo" if is_loopback(nodes[rank]) else local[nodes[rank]].name
        ledger.decide(
            "NODE_RANK", rank, "detected", f"{nodes[rank]} on {interface} is entry {rank} of NODES (counted from 0)"
        )
        return rank
    number = "none" if not matches else f"{len(matches)}"
    verb = "is an address" if not matches else "are addresses"
    cure = (
        f"Correct NODES, or set NODE_RANK (0 to {len(nodes) - 1}) on this node if it is behind address translation."
        if not matches
        else f"List one address per node, or set NODE_RANK ({' or '.join(map(str, matches))}) on this node."
    )
    ledger.refuse(
        "NODES",
        f"{shown('NODES', written)}: {number} of these {verb} of this machine, so its rank is unknown. {cure}\n"
        f"{listing(host, nodes)}",
    )
    return None


def _given_rank(given: Value, nodes: tuple[str, ...], matches: list[int], host: Host, ledger: Ledger) -> int | None:
    rank = int(given.text)
    if rank >= len(nodes):
        ledger.refuse(
            "NODE_RANK",
            f"{shown('NODE_RANK', given)}, but NODES lists {count(len(nodes), 'node')}: ranks run from 0 to "
            f"{len(nodes) - 1}. Correct it, or remove it to have it found by address.",
        )
        return None
    if rank in matches:
        ledger.take("NODE_RANK", given, f"as you set it; {nodes[rank]} is an address of this machine")
        return rank
    if matches:
        mine = ", ".join(f"{nodes[index]} (node {index})" for index in matches)
        ledger.refuse(
            "NODE_RANK",
            f"{shown('NODE_RANK', given)} is {nodes[rank]} by NODES, but this machine has {mine}. "
            "Remove NODE_RANK to have it found by address, or correct NODES.",
        )
        return None
    ledger.take("NODE_RANK", given, f"as you set it; {nodes[rank]} is not an address of this machine")
    ledger.warn(
        f"{shown('NODE_RANK', given)} cannot be checked: none of NODES is an address of this machine. That is right "
        "behind address translation only.\n" + listing(host, nodes)
    )
    return rank
