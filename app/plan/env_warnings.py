"""Values that users copy from elsewhere and that cost speed or correctness. They are kept; the cost is named."""

from collections.abc import Callable
from dataclasses import dataclass

from app.config.settings import Settings
from app.config.values import Value
from app.host import Host
from app.host.addresses import is_link_local
from app.host.nics import Nic
from app.plan.decisions import Ledger
from app.plan.local import Own
from app.plan.node_list import NodeList
from app.plan.resource_checks import speed_of
from app.plan.typos import misspelt


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A variable of NCCL, Gloo or torch that costs something where `harmful` says so of its value."""

    name: str
    cost: str
    harmful: Callable[[str], bool] = lambda _text: True
    fix: str = "Remove it"
    check: str = "settings"


def equals(*texts: str) -> Callable[[str], bool]:
    return lambda text: text.upper() in texts


DEBUGGING = "Set it for debugging only"
DERIVED = "Remove it: it is derived on each node"
COSTS: tuple[Cost, ...] = (
    Cost(
        check="gpus",
        name="NCCL_P2P_DISABLE",
        harmful=equals("1"),
        cost="GPUs of one machine then talk through the CPU's memory, without NVLink",
        fix="Remove it; if it mends a hang, switch off PCI ACS or the IOMMU instead",
    ),
    Cost(
        check="gpus",
        name="NCCL_SHM_DISABLE",
        harmful=equals("1"),
        cost="processes of one machine then talk over the network",
        fix="Remove it and give /dev/shm more room (SHM_SIZE)",
    ),
    Cost(
        check="rdma",
        name="NCCL_IB_GID_INDEX",
        harmful=lambda text: text != "-1",
        cost="the index differs between machines and changes with their addresses; NCCL finds it itself since 2.21",
        fix="Remove it, or choose by network with NCCL_IB_ADDR_RANGE",
    ),
    Cost(
        check="gpus",
        name="NCCL_NVLS_ENABLE",
        harmful=equals("0", "1"),
        cost="NCCL finds out itself (2): 1 fails where NVLink SHARP is missing, 0 gives up its speed",
    ),
    Cost(
        check="gpus",
        name="NCCL_CUMEM_ENABLE",
        harmful=equals("0"),
        cost="user buffers, NVLink SHARP and multi-node NVLink then do not work",
    ),
    Cost(
        check="rdma",
        name="NCCL_NET_GDR_LEVEL",
        harmful=equals("SYS", "5"),
        cost="cards then read GPU memory across CPUs, which is slow, and fails with PCI ACS",
    ),
    Cost(name="NCCL_ALGO", cost="one algorithm is forced for all sizes and operations, and some have none"),
    Cost(name="NCCL_PROTO", cost="one protocol is forced for all sizes; LL128 on unfit hardware corrupts data"),
    Cost(name="NCCL_COMM_ID", cost="torch makes its own id for each group; this one fits none"),
    Cost(name="NCCL_LAUNCH_MODE", cost="it concerns several GPUs in one process, not torchrun"),
    Cost(
        name="NCCL_BLOCKING_WAIT",
        cost="torch has renamed it: TORCH_NCCL_BLOCKING_WAIT. As 1 it switches the watchdog off",
    ),
    Cost(
        name="TORCH_NCCL_BLOCKING_WAIT",
        harmful=equals("1"),
        cost="the watchdog is then off, and a hang leaves no record",
    ),
    Cost(
        name="TORCH_FR_BUFFER_SIZE",
        harmful=equals("0"),
        cost="torch's record of the last collectives is then off, and a hang names no rank",
    ),
    Cost(
        name="TORCH_DISTRIBUTED_DEBUG",
        harmful=equals("DETAIL"),
        cost="every collective is then checked over Gloo first, which is slow",
        fix=DEBUGGING,
    ),
    Cost(
        name="CUDA_LAUNCH_BLOCKING", harmful=equals("1"), cost="each CUDA call then waits for its result", fix=DEBUGGING
    ),
    Cost(name="NCCL_DEBUG", harmful=equals("TRACE"), cost="every call is then logged, which is slow", fix=DEBUGGING),
    Cost(
        name="NCCL_SOCKET_NTHREADS",
        harmful=lambda text: text.isdigit() and int(text) > 16,
        cost="NCCL takes at most 16 threads",
        fix="Lower it",
    ),
    Cost(
        check="network",
        name="GLOO_DEVICE_TRANSPORT",
        harmful=lambda text: text.upper() not in ("TCP", "LINUX"),
        cost="torch's wheels know TCP only, and fail with 'unsupported gloo device'",
    ),
)


def warn_costs(settings: Settings, host: Host, ledger: Ledger) -> None:
    """Warnings about the values of NCCL, Gloo and torch that the user set."""
    for each in COSTS:
        value = settings.values.get(each.name)
        if value is not None and each.harmful(value.text):
            name = f"{each.check}.{each.name.lower().replace('_', '-')}"
            ledger.warn(name, what="{given} is kept: {cost}", fix=each.fix, given=value, cost=each.cost)
    _check_gloo_interface(settings.gloo_socket_ifname, host, ledger)
    _check_nccl_interface(settings.nccl_socket_ifname, host, ledger)
    _check_rdma_unused(settings, host, ledger)


def warn_elsewhere(settings: Settings, host: Host, nodes: NodeList, backend: str, ledger: Ledger) -> None:
    """A named interface that does not carry this node's address: the other nodes are sent to what it carries."""
    if len(nodes.addresses) < 2:
        return
    mine = nodes.own
    own = next((nic for nic in host.nics if nic.name == mine.interface), None)
    given = [settings.gloo_socket_ifname, settings.nccl_socket_ifname if backend == "nccl" else None]
    for value in given:
        chosen = _named(value, host) if value is not None else []
        if own is None or not chosen or own in chosen or _may_be_meant(chosen[0], own, mine, host):
            continue
        lost = _leads_nowhere(chosen[0])
        where = "would try to connect to {other} and fail" if lost else "would be sent to {other}, in another network"
        ledger.warn(
            "network.other-interface",
            what=f"{{given}} is kept, but {{fact}}, and this node's address {{address}} is on {{own}}: the other "
            f"nodes {where}",
            fix=DERIVED,
            severity="severe" if lost else "warning",
            given=value,
            fact=_carries(chosen[0]),
            address=mine.address,
            own=own.name,
            other=chosen[0].name,
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
        add(
            "settings.unknown-variable",
            what="{name} ({source}) is unknown to NCCL 2.30, Gloo, torch and torchrun-compose",
            fix="Did you mean {meant}?",
            setting=name,
            name=name,
            source=settings.values[name].source,
            meant=meant,
        )


def _check_gloo_interface(value: Value[str] | None, host: Host, ledger: Ledger) -> None:
    names = [nic.name for nic in host.nics]
    wrong = [name for name in value.text.split(",") if name not in names] if value else []
    if wrong and wrong[0][:1] in ("^", "="):
        ledger.warn(
            "network.gloo-syntax",
            what="{given} is kept, but Gloo knows no ^ and no =, only plain names, and will fail with 'Unable to find "
            "address'",
            fix="Remove it, or name one interface",
            severity="severe",
            given=value,
        )
    elif wrong and names:
        ledger.warn(
            "network.no-such-interface",
            what="{given} is kept, but {missing} is no interface here ({names}). Gloo will fail with 'Unable to find "
            "address'",
            fix=DERIVED,
            severity="severe",
            given=value,
            missing=wrong[0],
            names=names,
        )


def _check_nccl_interface(value: Value[str] | None, host: Host, ledger: Ledger) -> None:
    names = [nic.name for nic in host.nics]
    if value is not None and names and not matching(value.text, names):
        ledger.warn(
            "network.no-such-interface",
            what="{given} is kept, but matches no interface here ({names}). NCCL will fail with 'no socket interface "
            "found'",
            fix=DERIVED,
            severity="severe",
            given=value,
            names=names,
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
    total = float(sum(port.rate for port in host.rdma_ports if port.state == "ACTIVE"))
    for name, off in (("NCCL_IB_DISABLE", "1"), ("NCCL_NET", "socket")):
        value = settings.values.get(name)
        if value is not None and value.text.lower() == off and total:
            ledger.warn(
                "rdma.unused",
                what="{given} is kept: {total:g} Gb/s of RDMA on this machine stay unused, and the nodes talk over "
                "sockets",
                fix="Remove it to have the ports chosen",
                given=value,
                total=total,
            )
