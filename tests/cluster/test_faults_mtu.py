"""A path with a smaller MTU than the nodes' cards: connections open, and the first full-size packet is lost for ever.

Real namespaces and wires, but native launchers: what is tested is the reach test, and no container is needed for it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed import network
from tests.testbed.shell import run

PROJECT = Path(__file__).resolve().parents[2]
PREFIX = f"tm{os.getpid()}"[:9]


@pytest.fixture(params=[(1500, 1400), (1420, 1200)], ids=["a switch", "a VPN"])
def narrow(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Two namespaces with cards of one MTU, and a way to the second that lets less through."""
    card, path = request.param
    network.add_bridge(PREFIX)
    names = [f"{PREFIX}n{index}" for index in range(2)]
    try:
        for index, name in enumerate(names):
            network.add_namespace(name)
            port, address = f"{PREFIX}p{index}", f"10.79.0.{index + 1}/24"
            network.add_link(netns=name, bridge=PREFIX, interface="ens1", address=address, outside=port)
            # Virtual cards hand over 64 KB at a time, which no switch would check; real wires carry packets.
            one_at_a_time = ["gso_max_segs", "1", "gso_max_size", str(card)]
            run(["ip", "-n", name, "link", "set", "ens1", "mtu", str(card), *one_at_a_time])
        run(["ip", "link", "set", f"{PREFIX}p1", "mtu", str(path)])
        yield names
    finally:
        for index, name in enumerate(names):
            network.remove_link(f"{PREFIX}p{index}")
            network.remove_namespace(name)
        network.remove_link(PREFIX)


def test_full_size_packets_that_do_not_pass_are_told_by_pair_before_anything_starts(
    tmp_path: Path, narrow: list[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('started')")
    launchers = [
        subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{name}", sys.executable, str(PROJECT / "entrypoint.py"), "run", str(script)],
            env={
                "PATH": os.environ["PATH"],
                "NODES": "10.79.0.1,10.79.0.2",
                "NPROC_PER_NODE": "1",
                "RUNS_ROOT": str(tmp_path / name),
            },
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in narrow
    ]
    outputs = [launcher.communicate(timeout=60)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [3, 3], outputs
    for output in outputs:
        assert "node 0 (10.79.0.1) to node 1 (10.79.0.2), port" in output
        assert "connects, but full-size packets do not pass: a smaller MTU on the way?" in output
        assert "started" not in output
        assert "let this node in" not in output
        assert "Traceback" not in output
