"""Real multi-node clusters on one machine: a network namespace and a Docker engine per node.

    from tests.testbed import cluster
    with cluster(nodes=2) as bed:
        stacks = [node.up(env={"NODES": bed.addresses}) for node in bed.nodes]
        codes = [stack.wait(120) for stack in stacks]

It needs root, and fetches an engine and a base image by itself where the machine has none. Nothing of it is needed to
use torchrun-compose.
"""

from tests.testbed.cluster import Cluster, cluster
from tests.testbed.node import Node
from tests.testbed.shell import BedError
from tests.testbed.stack import Finished, Stack

__all__ = ["BedError", "Cluster", "Finished", "Node", "Stack", "cluster"]
