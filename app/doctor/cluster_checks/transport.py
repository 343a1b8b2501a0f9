"""What NCCL or Gloo really used for a collective: read from NCCL's own log, and from the interfaces' byte counters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from app.doctor.cluster_checks.speed import Speeds
from app.doctor.findings import Finding, Value, green, wrong
from app.host.accelerators import VENDORS

VIA = re.compile(r"via NET/([^/\s(]+(?: [^/\s(]+)*)/(\d+)(?:\([^)]*\))?((?:/\w+)*)")
"""`Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA` (nccl/src/transport/net.cc)."""
INSIDE = re.compile(r" via (P2P|SHM)/")
"""`Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read`, `via SHM/direct/direct` (nccl/src/transport/p2p.cc, shm.cc)."""
NETWORK = re.compile(r"NCCL INFO Using network (.+?)\s*$", re.MULTILINE)
DEVICES = re.compile(r"NCCL INFO NET/(?:IB|Socket) : Using (.+?)(?: ?\[RO\])?(?: ?; OOB .*)?\s*$", re.MULTILINE)
VERSION = re.compile(r"NCCL version (\d+(?:\.\d+)+)")
SOCKETS = ("Socket",)
WAYS = {"P2P": "GPUs read each other's memory (P2P)", "SHM": "through the processor's memory (SHM)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NcclLog:
    """NCCL's choices, as it logs them under NCCL_DEBUG=INFO. Empty where the log does not tell."""

    network: str = ""
    """`IB` (which is RoCE too), `Socket`, or a plugin's name (`IBext`, `AWS Libfabric`)."""
    devices: tuple[str, ...] = ()
    """As NCCL names them: `mlx5_0:1/IB`, `eth0:10.0.0.1<0>`."""
    inside: tuple[str, ...] = ()
    """How GPUs of one node reach each other: `P2P`, `SHM`."""
    channels: int = 0
    """Connections to other nodes."""
    direct: int = 0
    """Those of them by which the card reads GPU memory itself (GPUDirect RDMA)."""
    version: str = ""


def read_nccl(log: str) -> NcclLog:
    """The choices in the log of one node, all its ranks together."""
    channels = VIA.findall(log)
    networks = [*NETWORK.findall(log), *(name for name, _, _ in channels)]
    device_lists = [re.findall(r"\[\d+\](\S+)", line) for line in DEVICES.findall(log)]
    version = VERSION.search(log)
    return NcclLog(
        # What the channels say counts more than what was announced: some go through shared memory or NVLink instead.
        network=networks[-1] if networks else "",
        devices=tuple(dict.fromkeys(device for devices in device_lists for device in devices)),
        inside=tuple(sorted({*INSIDE.findall(log)})),
        channels=len(channels),
        direct=sum("/GDRDMA" in rest for _, _, rest in channels),
        version=version[1] if version else "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCheck:
    """One node's part of the all-reduce, and what the plan expected of it."""

    failure: str = ""
    """Why it did not work; "" if it did, with right results."""
    vendor: str = "NVIDIA"
    """Of the GPUs here."""
    backend: str = "gloo"
    ranks: int = 0
    alone: bool = False
    """All ranks are on one node: nothing goes over a network that could be judged."""
    bus_bandwidth: float = 0.0
    """Bytes per second, as nccl-tests defines it."""
    interface: str = ""
    """The one that the plan chose."""
    carrier: str = ""
    """The interface whose counters moved most; "" where none moved enough to tell."""
    transport: str = "sockets"
    """What the plan expected: InfiniBand, RoCE or sockets."""
    expects_direct: bool = False
    active_ports: int = 0
    """RDMA ports of this machine with a link."""
    log: NcclLog = NcclLog()
    speeds: Speeds = field(default_factory=Speeds)


def judge_transport(found: CollectiveCheck) -> Finding:
    """The verdict on what was really used, against what the hardware offers."""
    if found.failure:
        return wrong("all-reduce-failed", reason=found.failure)
    how = "{backend} on {ranks} ranks, {gigabits:.1f} Gb/s bus bandwidth, "
    values: dict[str, Value] = {
        "backend": found.backend,
        "ranks": found.ranks,
        "gigabits": 8 * found.bus_bandwidth / 1e9,
    }
    if found.alone:
        ways = " and ".join(WAYS[way] for way in found.log.inside if way in WAYS)
        return green("all-reduce", how + "inside this machine{ways}", **values, ways=f": {ways}" if ways else "")
    if found.backend == "nccl" and (fallback := _nccl_fallback(found)):
        return fallback
    if found.carrier and found.carrier != found.interface:
        return wrong("wrong-interface", carrier=found.carrier, interface=found.interface)
    return green("all-reduce", how + "through {transport}", **values, transport=_used(found))


def _nccl_fallback(found: CollectiveCheck) -> Finding | None:
    log = found.log
    if not log.network:
        # One GPU a node, or all ranks on one node: nothing went over a network that could be judged.
        return None
    if log.network in SOCKETS and found.active_ports:
        layer = found.transport if found.transport != "sockets" else "InfiniBand or RoCE"
        return wrong("nccl-sockets", layer=layer, ports=found.active_ports, devices=_named(log))
    if found.expects_direct and log.network not in SOCKETS and log.channels and not log.direct:
        remedy = VENDORS[found.vendor].fixes["nccl-no-gpudirect"]
        return wrong("nccl-no-gpudirect", network=log.network, remedy=remedy)
    return None


def _named(log: NcclLog) -> str:
    return ", ".join(log.devices) or "devices unknown"


def _used(found: CollectiveCheck) -> str:
    log = found.log
    if found.backend == "nccl" and log.network:
        direct = f", {log.direct} of {log.channels} channels with GPUDirect" if log.channels else ""
        return f"{log.network} ({_named(log)}{direct})"
    return found.carrier or f"{found.interface} (its counters do not tell)"


def carrier(before: Mapping[str, int], after: Mapping[str, int], least: int) -> str:
    """The interface that moved most bytes between two readings, if it moved at least `least`; "" otherwise."""
    moved = {name: count - before.get(name, count) for name, count in after.items()}
    most = max(moved, key=lambda name: moved[name], default="")
    return most if most and moved[most] >= least else ""
