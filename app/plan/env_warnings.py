"""Values that users copy from elsewhere and that cost speed or correctness. They are kept; the cost is named."""

from collections.abc import Callable

from app.config.settings import Settings
from app.host import Host
from app.host.addresses import is_link_local
from app.host.nics import Nic
from app.plan.decisions import Ledger, shown
from app.plan.local import Own
from app.plan.node_list import NodeList
from app.plan.resource_checks import speed_of
from app.plan.typos import misspelt

COSTS: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    (
        "NCCL_P2P_DISABLE",
        lambda text: text == "1",
        "GPUs of one machine then talk through the CPU's memory, without NVLink. Remove it; if it cures a hang, switch "
        "off PCI ACS or the IOMMU instead",
    ),
    (
        "NCCL_SHM_DISABLE",
        lambda text: text == "1",
        "processes of one machine then talk over the network. Remove it and give /dev/shm more room (SHM_SIZE)",
    ),
    (
        "NCCL_IB_GID_INDEX",
        lambda text: text != "-1",
        "the index differs between machines and changes with their addresses; NCCL finds it itself since 2.21. Remove "
        "it, or choose by network with NCCL_IB_ADDR_RANGE",
    ),
    (
        "NCCL_NVLS_ENABLE",
        lambda text: text in ("0", "1"),
        "NCCL finds out itself (2): 1 fails where NVLink SHARP is missing, 0 gives up its speed. Remove it",
    ),
    (
        "NCCL_CUMEM_ENABLE",
        lambda text: text == "0",
        "user buffers, NVLink SHARP and multi-node NVLink then do not work. Remove it",
    ),
    (
        "NCCL_NET_GDR_LEVEL",
        lambda text: text.upper() == "SYS" or text == "5",
        "cards then read GPU memory across CPUs, which is slow, and fails with PCI ACS. Remove it",
    ),
    (
        "NCCL_ALGO",
        lambda _text: True,
        "one algorithm is forced for all sizes and operations, and some have none. Remove it",
    ),
    (
        "NCCL_PROTO",
        lambda _text: True,
        "one protocol is forced for all sizes; LL128 on unfit hardware corrupts data. Remove it",
    ),
    (
        "NCCL_COMM_ID",
        lambda _text: True,
        "torch makes its own id for each group; this one fits none. Remove it",
    ),
    ("NCCL_LAUNCH_MODE", lambda _text: True, "it concerns several GPUs in one process, not torchrun. Remove it"),
    (
        "NCCL_BLOCKING_WAIT",
        lambda _text: True,
        "torch has renamed it: TORCH_NCCL_BLOCKING_WAIT. As 1 it switches the watchdog off",
    ),
    (
        "TORCH_NCCL_BLOCKING_WAIT",
        lambda text: text == "1",
        "the watchdog is then off, and a hang leaves no record. Remove it",
    ),
    (
        "TORCH_FR_BUFFER_SIZE",
        lambda text: text == "0",
        "torch's record of the last collectives is then off, and a hang names no rank. Remove it",
    ),
    (
        "TORCH_DISTRIBUTED_DEBUG",
        lambda text: text.upper() == "DETAIL",
        "every collective is then checked over Gloo first, which is slow. For debugging only",
    ),
    ("CUDA_LAUNCH_BLOCKING", lambda text: text == "1", "each CUDA call then waits for its result. For debugging only"),
    (
        "NCCL_DEBUG",
        lambda text: text.upper() == "TRACE",
        "every call is then logged, which is slow. For debugging only",
    ),
    (
        "NCCL_SOCKET_NTHREADS",
        lambda text: text.isdigit() and int(text) > 16,
        "NCCL takes at most 16 threads",
    ),
    (
        "GLOO_DEVICE_TRANSPORT",
        lambda text: text.upper() not in ("TCP", "LINUX"),
        "torch's wheels know TCP only, and fail with 'unsupported gloo device'. Remove it",
    ),
)


def warn_costs(settings: Settings, host: Host, ledger: Ledger) -> None:
    """Warnings about the values of NCCL, Gloo and torch that the user set."""
    for name, harmful, cost in COSTS:
        value = settings.values.get(name)
        if value is not None and harmful(value.text):
            ledger.warn(f"{shown(name, value)} is kept: {cost}.")
    _check_gloo_interface(settings, host, ledger)
    _check_nccl_interface(settings, host, ledger)
    _check_rdma_unused(settings, host, ledger)


def warn_elsewhere(settings: Settings, host: Host, member: NodeList, backend: str, ledger: Ledger) -> None:
    """A named interface that does not carry this node's address: the other nodes are sent to what it carries."""
    if len(member.addresses) < 2:
        return
    for variable in ("GLOO_SOCKET_IFNAME", *(("NCCL_SOCKET_IFNAME",) if backend == "nccl" else ())):
        value = settings.values.get(variable)
        chosen = [] if value is None else _named(variable, value.text, host)
        own = next((nic for nic in host.nics if nic.name == member.own.interface), None)
        if value is None or own is None or not chosen or own in chosen:
            continue
        cost = _elsewhere(chosen[0], own, member.own, host)
        if cost:
            ledger.warn(
                f"{shown(variable, value)} is kept, but {_carries(chosen[0])}, and this node's address "
                f"{member.own.address} is on {own.name}: the other nodes would be sent to {chosen[0].name}{cost}. "
                "Remove it: it is derived on each node."
            )


def _named(variable: str, text: str, host: Host) -> list[Nic]:
    names = [nic.name for nic in host.nics]
    hits = text.split(",") if variable.startswith("GLOO") else matching(text, names)
    return [nic for nic in host.nics if nic.name in hits]


def _elsewhere(chosen: Nic, own: Nic, mine: Own, host: Host) -> str:
    """What that costs, as the end of a sentence. "" where it may be meant: another card in this node's network, or one
    of another network that is at least as fast, such as a fabric beside the network that NODES lists."""
    addresses = [each for each in chosen.addresses if not is_link_local(each.text)]
    if chosen.kind in ("loopback", "container") or not chosen.up or not addresses:
        return " in vain"
    network = next((each.network for each in own.addresses if each.text == mine.address), None)
    theirs, ours = speed_of(chosen, host), speed_of(own, host)
    if network in [each.network for each in addresses] or (theirs and ours and theirs >= ours):
        return ""
    return ", in another network"


def _carries(nic: Nic) -> str:
    if not nic.up:
        return f"{nic.name} is {nic.operstate}"
    return f"{nic.name} has {', '.join(address.text for address in nic.addresses[:2]) or 'no address'}"


def warn_typos(settings: Settings, ledger: Ledger) -> None:
    """Names that are known to nobody. Where something is wrong anyway, the typo may be why, so it is told with it."""
    for name, meant in misspelt(settings.values):
        source = settings.values[name].source
        message = f"{name} ({source}) is unknown to NCCL 2.30, Gloo, torch and torchrun-compose. Did you mean {meant}?"
        if ledger.problems:
            ledger.refuse(name, message)
        else:
            ledger.warn(message)


def _check_gloo_interface(settings: Settings, host: Host, ledger: Ledger) -> None:
    value = settings.values.get("GLOO_SOCKET_IFNAME")
    if value is None:
        return
    names = [nic.name for nic in host.nics]
    wrong = [name for name in value.text.split(",") if name not in names]
    if wrong and wrong[0][:1] in ("^", "="):
        ledger.warn(
            f"{shown('GLOO_SOCKET_IFNAME', value)} is kept, but Gloo knows no ^ and no =, only plain names, and will "
            "fail with 'Unable to find address'. Remove it, or name one interface."
        )
    elif wrong and names:
        ledger.warn(
            f"{shown('GLOO_SOCKET_IFNAME', value)} is kept, but {wrong[0]} is no interface here ({', '.join(names)}). "
            "Gloo will fail with 'Unable to find address'. Remove it: it is derived on each node."
        )


def _check_nccl_interface(settings: Settings, host: Host, ledger: Ledger) -> None:
    value = settings.values.get("NCCL_SOCKET_IFNAME")
    names = [nic.name for nic in host.nics]
    if value is not None and names and not matching(value.text, names):
        ledger.warn(
            f"{shown('NCCL_SOCKET_IFNAME', value)} is kept, but matches no interface here ({', '.join(names)}). NCCL "
            "will fail with 'no socket interface found'. Remove it: it is derived on each node."
        )


def matching(pattern: str, names: list[str]) -> list[str]:
    """What NCCL's list `[^][=]name[:port],...` selects: prefixes, exact names after =, all others after ^.

    Names are interfaces, or RDMA ports as `device:port`. Source: parseStringList and matchIfList in
    nccl/src/misc/utils.cc.
    """
    excluded = pattern.startswith("^")
    rest = pattern.removeprefix("^")
    exact = rest.startswith("=")
    entries = [entry.partition(":") for entry in rest.removeprefix("=").split(",") if entry]

    def hit(name: str) -> bool:
        device, _, port = name.partition(":")
        return not entries or any(
            (device == wanted if exact else device.startswith(wanted)) and (not port or not at or at == port)
            for wanted, _, at in entries
        )

    return [name for name in names if hit(name) != excluded]


def _check_rdma_unused(settings: Settings, host: Host, ledger: Ledger) -> None:
    total = sum(port.rate for port in host.rdma_ports if port.state == "ACTIVE")
    for name, off in (("NCCL_IB_DISABLE", "1"), ("NCCL_NET", "socket")):
        value = settings.values.get(name)
        if value is not None and value.text.lower() == off and total:
            ledger.warn(
                f"{shown(name, value)} is kept: {total:g} Gb/s of RDMA on this machine stay unused, and the nodes talk "
                "over sockets. Remove it to have the ports chosen."
            )
