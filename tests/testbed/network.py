"""The wires of a testbed: namespaces, one bridge, one link per node, and what can go wrong with them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from tests.testbed.engines import Tools
from tests.testbed.shell import BedError, run, until


def add_bridge(name: str) -> None:
    """A switch. Multicast snooping is off so that IPv6 works at once."""
    run(["ip", "link", "add", name, "type", "bridge", "mcast_snooping", "0"])
    run(["ip", "link", "set", name, "up"])


def add_namespace(name: str) -> None:
    """A node's network: only a loopback device."""
    run(["ip", "netns", "add", name])
    run(["ip", "-n", name, "link", "set", "lo", "up"])


def add_link(*, netns: str, bridge: str, interface: str, address: str, outside: str) -> None:
    """A cable from the bridge's port `outside` to `interface` in the namespace; address as 10.0.0.1/24."""
    run(["ip", "link", "add", outside, "type", "veth", "peer", "name", interface, "netns", netns])
    run(["ip", "link", "set", outside, "master", bridge, "up"])
    run(["ip", "-n", netns, "addr", "add", address, "dev", interface])
    run(["ip", "-n", netns, "link", "set", interface, "up"])


def set_port(outside: str, *, up: bool) -> None:
    """Pull or plug the cable: the node's interface loses or gets its carrier."""
    run(["ip", "link", "set", outside, "up" if up else "down"])


def block(tools: Tools, netns: str, *, ports: tuple[int, ...], reject: bool) -> None:
    """Firewall TCP ports of the node for everybody else; dropped without an answer unless `reject`."""
    verdict = "reject with tcp reset" if reject else "drop"
    wanted = ", ".join(str(port) for port in ports)
    rules = [
        "add table inet testbed",
        "add chain inet testbed input { type filter hook input priority 0 ; }",
        f'add rule inet testbed input iifname != "lo" tcp dport {{ {wanted} }} {verdict}',
    ]
    in_namespace(tools, netns, " ; ".join(rules))


def translate(tools: Tools, netns: str, interface: str, addresses: Mapping[str, str]) -> None:
    """Reach others, and itself, under addresses that no machine owns: {listed: real}."""
    rules = [
        "add table ip testbed",
        "add chain ip testbed output { type nat hook output priority -100 ; }",
        *(f"add rule ip testbed output ip daddr {listed} dnat to {real}" for listed, real in addresses.items()),
    ]
    in_namespace(tools, netns, " ; ".join(rules))
    for listed in addresses:
        run(["ip", "-n", netns, "route", "replace", listed, "dev", interface])


def unblock(tools: Tools, netns: str) -> None:
    """Remove all that `block` and `translate` added, routes apart."""
    in_namespace(
        tools, netns, "; ".join(f"add table {kind} testbed; delete table {kind} testbed" for kind in ("inet", "ip"))
    )


def in_namespace(tools: Tools, netns: str, rules: str) -> None:
    nft, env = tools.nft()
    run(["nsenter", f"--net=/run/netns/{netns}", *nft, rules], env=env)


def slow(netns: str, interface: str, outside: str, rate: str) -> None:
    """Limit both directions of a node's link; rate as tc writes it: 10mbit."""
    shape = ["root", "tbf", "rate", rate, "burst", "32kb", "latency", "50ms"]
    run(["tc", "-n", netns, "qdisc", "replace", "dev", interface, *shape])
    run(["tc", "qdisc", "replace", "dev", outside, *shape])


def full_speed(netns: str, interface: str, outside: str) -> None:
    """Undo `slow`; nothing happens on a link that was not slowed."""
    for command in (
        ["tc", "-n", netns, "qdisc", "del", "dev", interface, "root"],
        ["tc", "qdisc", "del", "dev", outside, "root"],
    ):
        with contextlib.suppress(BedError):
            run(command)


def bytes_moved(netns: str, interface: str) -> int:
    """Bytes that an interface of a namespace sent and received."""
    lines = run(["nsenter", f"--net=/run/netns/{netns}", "cat", "/proc/net/dev"]).splitlines()
    for line in lines:
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            fields = counters.split()
            return int(fields[0]) + int(fields[8])
    raise BedError(f"{netns} has no interface {interface}")


def remove_namespace(name: str) -> None:
    """End whatever still runs in the namespace and remove it; fine if it does not exist."""
    if not Path("/run/netns", name).exists():
        return
    for pid in run(["ip", "netns", "pids", name]).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    until(lambda: not run(["ip", "netns", "pids", name]).strip(), deadline=10, what=f"the processes in {name} to end")
    run(["ip", "netns", "del", name])


def remove_link(name: str) -> None:
    """Remove a bridge or a cable; fine if it does not exist."""
    if Path("/sys/class/net", name).exists():
        run(["ip", "link", "del", name])
