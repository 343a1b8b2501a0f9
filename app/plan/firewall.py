"""Rules that let only the nodes of this cluster reach what torch, Gloo, NCCL and the launcher listen on."""

import ipaddress
from collections.abc import Sequence

from app.plan.parts import JobNodes, Network

TABLE = "torchrun_compose"
ANY_PORTS = (32768, 60999)
"""What Linux hands out where /proc does not tell (net.ipv4.ip_local_port_range)."""


def ruleset(nodes: JobNodes, network: Network, ephemeral_ports: tuple[int, int] | None) -> str:
    """A file for `nft -f`, the same on every node but for its port range; loading it again replaces it.

    Only TCP ports on which a job listens are closed: the store, CONTROL_PORT, and the range from which Gloo, NCCL and
    the connectivity test take theirs. Loopback, replies and every other port stay as they are. What this table accepts
    may still be dropped by another table. Raises ValueError without the addresses of all nodes."""
    if not all(nodes.addresses):
        raise ValueError("the addresses of the other nodes are not known")
    first, last = ephemeral_ports or ANY_PORTS
    accepted = [
        f"    {family} saddr {{ {', '.join(addresses)} }} accept"
        for family, addresses in (("ip", _of(nodes.addresses, 4)), ("ip6", _of(nodes.addresses, 6)))
        if addresses
    ]
    return "\n".join(
        [
            f"table inet {TABLE} {{}}",
            f"delete table inet {TABLE}",
            f"table inet {TABLE} {{",
            "  chain input {",
            "    type filter hook input priority filter; policy accept;",
            '    iifname "lo" accept',
            "    ct state established,related accept",
            *accepted,
            f"    tcp dport {{ {network.master_port}, {network.control_port}, {first}-{last} }} drop",
            "  }",
            "}",
        ]
    )


def _of(addresses: Sequence[str], version: int) -> list[str]:
    return sorted({each.partition("%")[0] for each in addresses if ipaddress.ip_address(each).version == version})
