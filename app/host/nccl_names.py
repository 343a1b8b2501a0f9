"""How NCCL reads a list of interfaces or RDMA ports (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)."""

from collections.abc import Sequence


def matching(pattern: str, names: Sequence[str]) -> list[str]:
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
