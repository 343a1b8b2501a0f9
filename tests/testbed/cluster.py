"""A cluster on one machine: made, grown, cleared, and removed without a trace."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.testbed import network
from tests.testbed.engine import Engine, remove_cgroups
from tests.testbed.engines import Tools, find_tools
from tests.testbed.image import ensure_image, share_images, store_in_use, store_lock
from tests.testbed.node import Node
from tests.testbed.shell import BedError, cache_folder, say, try_lock

MOST_NODES = 4
MOST_CLUSTERS = 4
LOCK_SECONDS = 1800


@dataclass(slots=True, kw_only=True)
class Cluster:
    """Nodes that reach each other by one switch, and nothing else."""

    name: str
    tools: Tools
    image: str
    number: int
    nodes: list[Node] = field(default_factory=list)

    @property
    def addresses(self) -> str:
        """NODES for all nodes, in rank order."""
        return ",".join(node.address for node in self.nodes)

    def grow(self, count: int) -> None:
        """Have at least `count` nodes; engines start side by side."""
        if count > MOST_NODES:
            raise BedError(f"a testbed has at most {MOST_NODES} nodes")
        fresh = [self.plug_in(index) for index in range(len(self.nodes), count)]
        for node in fresh:
            with store_lock(self.tools):
                node.engine.layers = share_images(self.tools, node.engine.data)
            node.engine.launch()
            self.nodes.append(node)
        for node in fresh:
            node.engine.ready()

    def plug_in(self, index: int) -> Node:
        name, port = f"{self.name}n{index}", f"{self.name}p{index}"
        # Card names differ between real machines, and so they do here; an address of a private range of its own.
        interface, address = f"ens{index}f1np1", f"10.77.{self.number}.{11 + index}"
        network.add_namespace(name)
        network.add_link(netns=name, bridge=self.name, interface=interface, address=f"{address}/24", outside=port)
        home = Path("/run", self.name, name)
        data = cache_folder("nodes") / name
        engine = Engine(name=name, tools=self.tools, home=home, data=data, netns=name)
        folders = home / "stacks"
        return Node(
            index=index,
            name=name,
            interface=interface,
            address=address,
            port=port,
            bridge=self.name,
            engine=engine,
            folders=folders,
        )

    def clear(self) -> None:
        """All nodes as new, for the next test."""
        for node in self.nodes:
            node.clear()


@contextlib.contextmanager
def cluster(nodes: int = 2, *, tools: Tools | None = None) -> Iterator[Cluster]:
    """A running cluster with the project's image on every node.

    Engines run only while the context and the thread that entered it live. Raises BedError when none can be had.
    """
    tools = tools or find_tools()
    image = ensure_image(tools)
    with store_in_use(tools), reserved() as number:
        name = f"trc{number}"
        remove(name)
        bed = Cluster(name=name, tools=tools, image=image, number=number)
        try:
            network.add_bridge(name)
            bed.grow(nodes)
            yield bed
        finally:
            for node in bed.nodes:
                node.engine.stop(grace=5)
            remove(name)


@contextlib.contextmanager
def reserved() -> Iterator[int]:
    """A number that no other testbed on this machine uses; the kernel frees it when this process ends."""
    end, told = time.monotonic() + LOCK_SECONDS, False
    while time.monotonic() < end:
        for number in range(MOST_CLUSTERS):
            with Path(f"/run/lock/trc{number}.lock").open("w") as handle:
                if try_lock(handle.fileno()):
                    yield number
                    fcntl.flock(handle.fileno(), fcntl.LOCK_UN)
                    return
        if not told:
            say(f"{MOST_CLUSTERS} testbeds run on this machine already: waiting up to {LOCK_SECONDS} s for one to end")
            told = True
        time.sleep(0.5)
    raise BedError(f"{MOST_CLUSTERS} testbeds ran on this machine for {LOCK_SECONDS} s")


def remove(name: str) -> None:
    """Remove whatever a testbed of this name left: processes, namespaces, cables, cgroups, files."""
    for index in range(MOST_NODES):
        node = f"{name}n{index}"
        # Before the namespace, whose end would take its cable away at a time of its own.
        network.remove_link(f"{name}p{index}")
        network.remove_namespace(node)
        remove_cgroups(node)
        shutil.rmtree(cache_folder("nodes") / node, ignore_errors=True)
    network.remove_link(name)
    shutil.rmtree(Path("/run", name), ignore_errors=True)
