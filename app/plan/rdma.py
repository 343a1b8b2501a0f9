"""InfiniBand and RoCE ports for NCCL: which are usable, which NCCL would take by itself, what to tell it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.config.problems import count
from app.config.values import Value
from app.host import Host
from app.host.addresses import is_link_local
from app.host.nccl_names import matching
from app.host.nics import Nic
from app.host.rdma import RdmaPort
from app.plan.decisions import Ledger
from app.plan.exports import Exports
from app.plan.gid import decide_gid
from app.plan.local import Own
from app.plan.rdma_access import obstacle

LAYER = {"InfiniBand": "InfiniBand", "Ethernet": "RoCE"}
SLOW = 4.0
"""A port this many times slower than the fastest is there for management or storage: in one job with the others it
would set the pace of a ring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    port: RdmaPort
    reason: str

    def __str__(self) -> str:
        return f"{self.port.name} ({LAYER[self.port.link_layer]} {self.port.rate:g} Gb/s): {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PortChoice:
    """What NCCL will make of this machine's ports."""

    fit: tuple[RdmaPort, ...]
    """Those that a job should use."""
    rejected: tuple[Rejected, ...]
    taken: tuple[RdmaPort, ...]
    """Those that NCCL will take: these, or what the user's variables make of them."""
    usable: tuple[RdmaPort, ...]
    """Those of the taken that are fit for a job."""

    @property
    def layer(self) -> str:
        return LAYER[(self.usable or self.taken)[0].link_layer]

    @property
    def why_not(self) -> tuple[str, ...]:
        left = [Rejected(port=port, reason="NCCL_IB_HCA does not select it") for port in self.fit]
        return tuple(str(each) for each in [*self.rejected, *left] if each.port not in self.taken)


SOCKETS = ("sockets", ())


def decide_rdma(
    host: Host, own: Own | None, backend: str, ledger: Ledger, exports: Exports
) -> tuple[str, tuple[str, ...]]:
    """NCCL_IB_DISABLE, NCCL_IB_HCA and what stands in their way.

    Returns the transport that NCCL will use (`InfiniBand`, `RoCE` or `sockets`) and the ports that it will take.
    """
    _report_others(host, backend, ledger)
    choice = _choice(host, ledger, exports)
    if not host.rdma_ports:
        exports.offer("rdma", "NCCL_IB_DISABLE", "1", "no InfiniBand or RoCE device on this machine")
        return SOCKETS
    asked = exports.settings.nccl_ib_hca is not None
    if not choice.fit and not asked and backend == "nccl":
        ledger.warn("rdma.no-usable-port", "severe", why="; ".join(map(str, choice.rejected)))
    if not choice.taken:
        among = "no active port in NCCL_IB_HCA" if asked else f"no usable port among {len(host.rdma_ports)}"
        exports.offer("rdma", "NCCL_IB_DISABLE", "1", among, choice.why_not)
        return SOCKETS
    _report(choice, host, ledger)
    if _blocked(choice, host, backend, ledger, exports) or _switched_off(choice.layer, exports):
        return SOCKETS
    _decide_hca(choice, exports)
    if choice.layer == "RoCE" and own is not None:
        decide_gid(host, own, choice.usable, ledger, exports)
    return choice.layer, tuple(port.name for port in choice.taken)


def _report_others(host: Host, backend: str, ledger: Ledger) -> None:
    """Cards that are neither InfiniBand nor RoCE: NCCL's own code does not look at them."""
    efa = [port.name for port in host.other_ports if port.efa]
    others = [f"{port.name} ({port.link_layer})" for port in host.other_ports if not port.efa]
    plugin = host.rdma_software.efa_plugin
    if efa:
        reason = f"EFA: NCCL reaches it only through the aws-ofi-nccl plugin, which is {'' if plugin else 'not '}here"
        ledger.decide("rdma", "EFA ports", ",".join(efa), "detected", reason)
    if efa and not plugin and backend == "nccl":
        ledger.warn("rdma.efa-without-plugin", efa=len(efa))
    if others:
        ledger.decide("rdma", "other ports", ", ".join(others), "detected", "neither InfiniBand nor RoCE: left alone")


def _choice(host: Host, ledger: Ledger, exports: Exports) -> PortChoice:
    fit, rejected = choose(host)
    asked = exports.settings.nccl_ib_hca
    usable, taken = fit, fit
    if asked is not None:
        usable, taken = _as_asked(asked, host, ledger)
    elif not fit and exports.settings.text("NCCL_IB_DISABLE") == "0":
        # The user's 0 wins over the 1 that would keep NCCL from these.
        usable, taken = [], [port for port in host.rdma_ports if port.state == "ACTIVE"]
    return PortChoice(fit=tuple(fit), rejected=tuple(rejected), taken=tuple(taken), usable=tuple(usable))


def _report(choice: PortChoice, host: Host, ledger: Ledger) -> None:
    rates = " and ".join(f"{rate:g}" for rate in sorted({port.rate for port in choice.taken}))
    ports = count(len(choice.taken), "usable port" if choice.usable else "active port")
    names = ",".join(port.name for port in choice.taken)
    summary = f"{choice.layer}, {ports} of {rates} Gb/s"
    ledger.decide("rdma", "RDMA ports", names, "detected", summary, choice.why_not)
    decide_affinity(host, choice.taken, ledger)


def _blocked(choice: PortChoice, host: Host, backend: str, ledger: Ledger, exports: Exports) -> bool:
    blocked = obstacle(host, choice.taken, choice.layer)
    if blocked is None:
        return False
    exports.offer("rdma", "NCCL_IB_DISABLE", "1", blocked.cause)
    if backend == "nccl":
        ledger.warnings.append(blocked)
    return True


def _switched_off(layer: str, exports: Exports) -> bool:
    disabled = exports.settings.text("NCCL_IB_DISABLE") not in ("", "0")
    exports.keep("rdma", "NCCL_IB_DISABLE", f"as you set it: {layer} stays unused" if disabled else "as you set it")
    return disabled or exports.settings.text("NCCL_NET").lower() == "socket"


def _as_asked(asked: Value[str], host: Host, ledger: Ledger) -> tuple[list[RdmaPort], list[RdmaPort]]:
    """Of the ports that the user's NCCL_IB_HCA selects: those fit for a job, and those that NCCL will take, which are
    all that are active."""
    names = matching(asked.text, [port.name for port in host.rdma_ports])
    selected = [port for port in host.rdma_ports if port.name in names]
    usable, rejected = choose(replace(host, rdma_ports=tuple(selected)))
    taken = [port for port in selected if port.state == "ACTIVE"]
    wrong = [f"{each.port.name}: {each.reason}" for each in rejected if each.port in taken or not usable]
    if not selected:
        ports = [port.name for port in host.rdma_ports] or ["there is none"]
        ledger.warn("rdma.hca-selects-none", "severe", given=asked, ports=ports)
    elif wrong:
        ledger.warn("rdma.hca-selects-wrong", given=asked, wrong="; ".join(wrong), unused=not taken)
    _warn_prefix(asked, selected, ledger)
    return usable, taken


def _warn_prefix(asked: Value[str], selected: list[RdmaPort], ledger: Ledger) -> None:
    devices = {port.device for port in selected}
    meant = {entry.partition(":")[0] for entry in asked.text.split(",")}
    if asked.text[:1] not in ("=", "^") and meant & devices and devices - meant:
        ledger.warn("rdma.hca-prefix", given=asked, others=sorted(devices - meant), text=asked.text)


def choose(host: Host) -> tuple[list[RdmaPort], list[Rejected]]:
    """The ports that a job should use: active, connected, of one link layer, of one class of speed."""
    rejected: list[Rejected] = []
    usable: list[RdmaPort] = []
    for port in host.rdma_ports:
        wrong = _unusable(port, host)
        if wrong:
            rejected.append(Rejected(port=port, reason=wrong))
        else:
            usable.append(port)
    totals = {layer: sum(port.rate for port in usable if port.link_layer == layer) for layer in LAYER}
    layer = max(totals, key=lambda each: totals[each])
    best = max((port.rate for port in usable if port.link_layer == layer), default=0.0)
    near = [port for port in usable if port.link_layer == "InfiniBand" and near_gpu(port, host)]
    chosen: list[RdmaPort] = []
    for port in usable:
        wrong = _unfit(port, layer, totals, best, near)
        if wrong:
            rejected.append(Rejected(port=port, reason=wrong))
        else:
            chosen.append(port)
    return chosen, rejected


def _unusable(port: RdmaPort, host: Host) -> str:
    if port.link_layer == "InfiniBand" and port.state in ("INIT", "ARMED"):
        return f"the port is {port.state}, with a link but not set up by a subnet manager: does opensm run?"
    if port.state != "ACTIVE":
        return f"the port is {port.state}: no cable, or the other end is off"
    if port.iwarp:
        return "it speaks iWARP, which NCCL does not know"
    if port.management:
        return "it manages the NVLink switches, no traffic goes through it"
    if port.link_layer == "InfiniBand":
        return "" if port.lid and port.sm_lid else "no subnet manager has set it up (its lid is 0): does opensm run?"
    if any(carries_address(nic) for nic in carriers(port, host.nics)):
        return ""
    return f"its interface {' '.join(port.netdevs) or '(none here)'} has no address"


def _unfit(port: RdmaPort, layer: str, totals: dict[str, float], best: float, near: list[RdmaPort]) -> str:
    if port.link_layer != layer:
        return f"NCCL cannot mix link layers, and {LAYER[layer]} has {totals[layer]:g} Gb/s here in all"
    if port.rate * SLOW <= best:
        return f"{best / port.rate if port.rate else best:g} times slower than the fastest port: management or storage"
    if layer == "InfiniBand" and near and port not in near:
        return "it shares no PCI switch with a GPU, and others do: management or storage"
    return ""


def carriers(port: RdmaPort, nics: Sequence[Nic]) -> list[Nic]:
    """Interfaces whose traffic goes through a RoCE port: its own, and bonds and VLANs above it."""
    names = set(port.netdevs)
    for _ in range(3):
        names |= {nic.name for nic in nics if names & set(nic.lower) and nic.kind in ("bond", "vlan", "bridge")}
    return [nic for nic in nics if nic.name in names]


def carries_address(nic: Nic) -> bool:
    return any(not is_link_local(address.text) for address in nic.addresses)


def near_gpu(port: RdmaPort, host: Host) -> bool:
    return any(shared_bridges(port.pci, gpu.pci) >= 2 for gpu in host.gpus.visible)


def shared_bridges(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """How many folders of their PCI paths two devices share: 0 no root complex, 1 only that, more a switch."""
    count = 0
    for left, right in zip(first[:-1], second[:-1], strict=False):
        if left != right:
            break
        count += 1
    return count


def _decide_hca(choice: PortChoice, exports: Exports) -> None:
    # NCCL takes every active port by itself (net_ib/init.cc), whatever its link layer, address or distance.
    wrong = [each.port.name for each in choice.rejected if each.port.state == "ACTIVE"]
    value = "=" + ",".join(port.name for port in choice.fit)
    if choice.fit and wrong:
        exports.offer("rdma", "NCCL_IB_HCA", value, f"by itself NCCL would also take {', '.join(wrong)}")
    elif choice.fit and exports.settings.nccl_ib_hca is not None:
        exports.offer("rdma", "NCCL_IB_HCA", value, "all usable ports")
    elif choice.fit:
        why = "NCCL takes exactly these ports by itself"
        exports.ledger.decide("rdma", "NCCL_IB_HCA", "(unset)", "derived", why)


def decide_affinity(host: Host, ports: Sequence[RdmaPort], ledger: Ledger) -> None:
    """Reports for each GPU the port that shares most of its PCI path; NCCL finds the same by itself."""
    words = {0: "another root complex", 1: "the same root complex"}
    nearest: list[str] = []
    distances: dict[str, list[str]] = {}
    for gpu in host.gpus.visible:
        if gpu.pci and ports:
            port = max(ports, key=lambda each: shared_bridges(each.pci, gpu.pci))
            distance = words.get(shared_bridges(port.pci, gpu.pci), "the same switch")
            nearest.append(port.device)
            distances.setdefault(distance, []).append(str(gpu.index))
    where = "; ".join(f"{distance}: GPU {' '.join(gpus)}" for distance, gpus in distances.items())
    if nearest:
        why = f"the nearest port of each GPU, on {where}"
        ledger.decide("rdma", "GPU to port", ",".join(nearest), "detected", why)
