"""InfiniBand and RoCE ports for NCCL: which are usable, which NCCL would take by itself, what to tell it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.config.envfile import Value
from app.host import Host
from app.host.addresses import is_link_local
from app.host.nics import Nic
from app.host.rdma import RdmaPort
from app.plan.decisions import Ledger, count, shown
from app.plan.env_warnings import matching
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


def decide_rdma(host: Host, own: Own | None, backend: str, ledger: Ledger, exports: Exports) -> str:
    """NCCL_IB_DISABLE, NCCL_IB_HCA and what stands in their way. Returns the transport that NCCL will use.

    `InfiniBand`, `RoCE` or `sockets`.
    """
    asked = exports.settings.is_set("NCCL_IB_HCA")
    fit, rejected = choose(host)
    usable, taken = _taken(fit, host, ledger, exports)
    left = [Rejected(port=port, reason="NCCL_IB_HCA does not select it") for port in fit if port not in taken]
    why_not = tuple(str(each) for each in [*rejected, *left] if each.port not in taken)
    if not host.rdma_ports:
        exports.offer("NCCL_IB_DISABLE", "1", "no InfiniBand or RoCE device on this machine")
        return "sockets"
    if not fit and not asked and backend == "nccl":
        because = "; ".join(map(str, rejected))
        ledger.warn(f"RDMA devices are on this machine, but no port is usable: {because}.")
    if not taken:
        among = "no active port in NCCL_IB_HCA" if asked else f"no usable port among {len(host.rdma_ports)}"
        exports.offer("NCCL_IB_DISABLE", "1", among, why_not)
        return "sockets"
    layer = LAYER[(usable or taken)[0].link_layer]
    rates = " and ".join(f"{rate:g}" for rate in sorted({port.rate for port in taken}))
    summary = f"{layer}, {count(len(taken), 'usable port' if usable else 'active port')} of {rates} Gb/s"
    ledger.decide("RDMA ports", ",".join(port.name for port in taken), "detected", summary, why_not)
    decide_affinity(host, taken, ledger)
    blocked = obstacle(host, taken)
    if blocked:
        exports.offer("NCCL_IB_DISABLE", "1", f"{layer} is here, but unusable: {blocked}")
        if backend == "nccl":
            where = "container" if host.container else "process"
            ledger.warn(f"{layer} is on this machine but the {where} cannot use it, because {blocked}.")
        return "sockets"
    disabled = exports.settings.text("NCCL_IB_DISABLE") not in ("", "0")
    exports.keep("NCCL_IB_DISABLE", "as you set it" + (f": {layer} stays unused" if disabled else ""))
    if disabled or exports.settings.text("NCCL_NET").lower() == "socket":
        return "sockets"
    _decide_hca(fit, rejected, exports)
    if layer == "RoCE" and own is not None:
        decide_gid(host, own, usable, ledger, exports)
    return layer


def _taken(fit: list[RdmaPort], host: Host, ledger: Ledger, exports: Exports) -> tuple[list[RdmaPort], list[RdmaPort]]:
    """The ports that NCCL will take, and before them those of these that are fit for a job."""
    asked = exports.settings.values.get("NCCL_IB_HCA")
    if asked is not None:
        return _as_asked(asked, host, ledger)
    if fit or exports.settings.text("NCCL_IB_DISABLE") != "0":
        return fit, fit
    # The user's 0 wins over the 1 that would keep NCCL from these.
    return [], [port for port in host.rdma_ports if port.state == "ACTIVE"]


def _as_asked(asked: Value, host: Host, ledger: Ledger) -> tuple[list[RdmaPort], list[RdmaPort]]:
    """Of the ports that the user's NCCL_IB_HCA selects: those fit for a job, and those that NCCL will take, which are
    all that are active."""
    names = matching(asked.text, [port.name for port in host.rdma_ports])
    selected = [port for port in host.rdma_ports if port.name in names]
    usable, rejected = choose(replace(host, rdma_ports=tuple(selected)))
    taken = [port for port in selected if port.state == "ACTIVE"]
    wrong = [f"{each.port.name}: {each.reason}" for each in rejected if each.port in taken or not usable]
    kept = f"{shown('NCCL_IB_HCA', asked)} is kept, but"
    then = "." if taken else ". NCCL goes over to sockets without a word."
    if not selected:
        here = ", ".join(port.name for port in host.rdma_ports) or "there is none"
        ledger.warn(f"{kept} matches no RDMA device or port here ({here}){then}")
    elif wrong:
        ledger.warn(f"{kept} selects {'; '.join(wrong)}{then}")
    _warn_prefix(asked, selected, ledger)
    return usable, taken


def _warn_prefix(asked: Value, selected: list[RdmaPort], ledger: Ledger) -> None:
    devices = {port.device for port in selected}
    meant = {entry.partition(":")[0] for entry in asked.text.split(",")}
    if asked.text[:1] not in ("=", "^") and meant & devices and devices - meant:
        ledger.warn(
            f"{shown('NCCL_IB_HCA', asked)} is kept, but it is a prefix and also matches "
            f"{', '.join(sorted(devices - meant))}. Write NCCL_IB_HCA=={asked.text} for exactly that."
        )


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


def _decide_hca(fit: list[RdmaPort], rejected: list[Rejected], exports: Exports) -> None:
    # NCCL takes every active port by itself (net_ib/init.cc), whatever its link layer, address or distance.
    wrong = [each for each in rejected if each.port.state == "ACTIVE"]
    value = "=" + ",".join(port.name for port in fit)
    if fit and wrong:
        names = ", ".join(each.port.name for each in wrong)
        exports.offer("NCCL_IB_HCA", value, f"by itself NCCL would also take {names}")
    elif fit and exports.settings.is_set("NCCL_IB_HCA"):
        exports.offer("NCCL_IB_HCA", value, "all usable ports")
    elif fit:
        exports.ledger.decide("NCCL_IB_HCA", "(unset)", "derived", "NCCL takes exactly these ports by itself")


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
        ledger.decide("GPU to port", ",".join(nearest), "detected", f"the nearest port of each GPU, on {where}")
