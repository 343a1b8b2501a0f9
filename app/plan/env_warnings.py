"""Values that users copy from elsewhere and that cost speed or correctness. They are kept; the cost is named."""

from collections.abc import Callable, Mapping
from ipaddress import ip_network

from app.config.settings import Settings
from app.config.values import Value
from app.host import Host
from app.host.addresses import is_link_local, parse
from app.host.nccl_names import matching
from app.host.nics import Nic, routed_by
from app.plan.decisions import Ledger
from app.plan.local import Own
from app.plan.node_list import NodeList
from app.plan.resource_checks import speed_of
from app.plan.typos import misspelt

OVERLAY = ip_network("100.64.0.0/10")
"""Shared address space (RFC 6598), of which Tailscale and others give addresses to nodes."""


def equals(*texts: str) -> Callable[[str], bool]:
    return lambda text: text.upper() in texts


def anything(_text: str) -> bool:
    return True


COSTS: Mapping[str, tuple[str, Callable[[str], bool]]] = {
    "NCCL_P2P_DISABLE": ("gpus.nccl-p2p-disable", equals("1")),
    "NCCL_SHM_DISABLE": ("gpus.nccl-shm-disable", equals("1")),
    "NCCL_IB_GID_INDEX": ("rdma.nccl-ib-gid-index", lambda text: text != "-1"),
    "NCCL_NVLS_ENABLE": ("gpus.nccl-nvls-enable", equals("0", "1")),
    "NCCL_CUMEM_ENABLE": ("gpus.nccl-cumem-enable", equals("0")),
    "NCCL_NET_GDR_LEVEL": ("rdma.nccl-net-gdr-level", equals("SYS", "5")),
    "NCCL_ALGO": ("settings.nccl-algo", anything),
    "NCCL_PROTO": ("settings.nccl-proto", anything),
    "NCCL_COMM_ID": ("settings.nccl-comm-id", anything),
    "NCCL_LAUNCH_MODE": ("settings.nccl-launch-mode", anything),
    "NCCL_BLOCKING_WAIT": ("settings.nccl-blocking-wait", anything),
    "TORCH_NCCL_BLOCKING_WAIT": ("settings.torch-nccl-blocking-wait", equals("1")),
    "TORCH_FR_BUFFER_SIZE": ("settings.torch-fr-buffer-size", equals("0")),
    "TORCH_DISTRIBUTED_DEBUG": ("settings.torch-distributed-debug", equals("DETAIL")),
    "CUDA_LAUNCH_BLOCKING": ("settings.cuda-launch-blocking", equals("1")),
    "NCCL_DEBUG": ("settings.nccl-debug", equals("TRACE")),
    "NCCL_SOCKET_NTHREADS": ("settings.nccl-socket-nthreads", lambda text: text.isdigit() and int(text) > 16),
    "GLOO_DEVICE_TRANSPORT": ("network.gloo-device-transport", lambda text: text.upper() not in ("TCP", "LINUX")),
}
"""Variables of NCCL, Gloo and torch that cost something: the warning, and of which values. Those of the libraries'
documentation, and of what users copy from each other."""


def warn_costs(settings: Settings, host: Host, ledger: Ledger) -> None:
    """Warnings about the values of NCCL, Gloo and torch that the user set."""
    for name, (id, harmful) in COSTS.items():
        value = settings.values.get(name)
        if value is not None and harmful(value.text):
            ledger.warn(id, given=value)
    _check_gloo_interface(settings.gloo_socket_ifname, host, ledger)
    _check_nccl_interface(settings.nccl_socket_ifname, host, ledger)
    _check_rdma_unused(settings, host, ledger)


def warn_elsewhere(settings: Settings, host: Host, nodes: NodeList, backend: str, ledger: Ledger) -> None:
    """A named interface that does not carry this node's address: the other nodes are sent to what it carries; and
    nodes that are listed by addresses of two networks."""
    if len(nodes.addresses) < 2:
        return
    overlay = [each for each in nodes.addresses if _in_overlay(each, host)]
    direct = [each for each in nodes.addresses if each not in overlay]
    if overlay and direct:
        ledger.warn("network.mixed", "severe", overlay=overlay[0], direct=direct[0])
    mine = nodes.own
    own = next((nic for nic in host.nics if nic.name == mine.interface), None)
    given = [settings.gloo_socket_ifname, settings.nccl_socket_ifname if backend == "nccl" else None]
    for value in given:
        chosen = _named(value, host) if value is not None else []
        if own is None or not chosen or own in chosen or _may_be_meant(chosen[0], own, mine, host):
            continue
        lost = _leads_nowhere(chosen[0])
        ledger.warn(
            "network.other-interface",
            "severe" if lost else "warning",
            given=value,
            fact=_carries(chosen[0]),
            address=mine.address,
            own=own.name,
            other=chosen[0].name,
            lost=lost,
        )


def _in_overlay(address: str, host: Host) -> bool:
    """Whether an address belongs to a VPN, as far as this machine can tell: routes of some are in tables of theirs."""
    parsed = parse(address)
    tunnels = [nic for nic in host.nics if nic.kind == "tunnel"]
    return parsed is not None and (
        parsed in OVERLAY
        or routed_by(host.routes, parsed) in [nic.name for nic in tunnels]
        or any(parsed in each.network for nic in tunnels for each in nic.addresses)
    )


def _named(value: Value[str], host: Host) -> list[Nic]:
    names = [nic.name for nic in host.nics]
    hits = value.text.split(",") if value.name.startswith("GLOO") else matching(value.text, names)
    return [nic for nic in host.nics if nic.name in hits]


def _leads_nowhere(chosen: Nic) -> bool:
    reachable = any(not is_link_local(each.text) for each in chosen.addresses)
    return chosen.kind in ("loopback", "container") or not chosen.up or not reachable


def _may_be_meant(chosen: Nic, own: Nic, mine: Own, host: Host) -> bool:
    """Another card in this node's network, or one of another network that is at least as fast, such as a fabric beside
    the network that NODES lists."""
    if _leads_nowhere(chosen):
        return False
    network = next((each.network for each in own.addresses if each.text == mine.address), None)
    networks = [each.network for each in chosen.addresses if not is_link_local(each.text)]
    theirs, ours = speed_of(chosen, host), speed_of(own, host)
    return network in networks or bool(theirs and ours and theirs >= ours)


def _carries(nic: Nic) -> str:
    if not nic.up:
        return f"{nic.name} is {nic.operstate}"
    return f"{nic.name} has {', '.join(address.text for address in nic.addresses[:2]) or 'no address'}"


def warn_typos(settings: Settings, ledger: Ledger) -> None:
    """Names that are known to nobody. Where something is wrong anyway, the typo may be why, so it is told with it."""
    add = ledger.refuse if ledger.problems else ledger.warn
    for name, meant in misspelt(settings.values):
        add("settings.unknown-variable", setting=name, name=name, source=settings.values[name].source, meant=meant)


def _check_gloo_interface(value: Value[str] | None, host: Host, ledger: Ledger) -> None:
    names = [nic.name for nic in host.nics]
    wrong = [name for name in value.text.split(",") if name not in names] if value else []
    if wrong and wrong[0][:1] in ("^", "="):
        ledger.warn("network.gloo-syntax", "severe", given=value)
    elif wrong and names:
        ledger.warn("network.no-such-interface", "severe", given=value, gloo=True, missing=wrong[0], names=names)


def _check_nccl_interface(value: Value[str] | None, host: Host, ledger: Ledger) -> None:
    names = [nic.name for nic in host.nics]
    if value is not None and names and not matching(value.text, names):
        ledger.warn("network.no-such-interface", "severe", given=value, gloo=False, missing=value.text, names=names)


def _check_rdma_unused(settings: Settings, host: Host, ledger: Ledger) -> None:
    total = float(sum(port.rate for port in host.rdma_ports if port.state == "ACTIVE"))
    for name, off in (("NCCL_IB_DISABLE", "1"), ("NCCL_NET", "socket")):
        value = settings.values.get(name)
        if value is not None and value.text.lower() == off and total:
            ledger.warn("rdma.unused", given=value, total=total)
