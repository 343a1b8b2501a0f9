"""The testbed keeps its promises; every other test of this folder leans on them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.testbed import BedError, Cluster, Node, cluster
from tests.testbed.engines import DEFAULT_MIRROR, mirror
from tests.testbed.shell import PROJECT, cache_folder, until

SLEEPER = {"workspace/sleep.py": "import time\nprint('sleeping', flush=True)\ntime.sleep(600)\n"}
# Stands in for the launcher where only the container's life is of interest.
OVERRIDE = {
    "compose.override.yaml": "services: {trainer: {entrypoint: [python, /workspace/sleep.py], stop_grace_period: 1s}}\n"
}

CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1).close()
    print("open")
except ConnectionRefusedError:
    print("refused")
except OSError:
    print("silent")
"""


def connect(node: Node, address: str, port: int = 8000) -> str:
    """open, refused or silent, as a connection from the node finds it."""
    return node.shell(sys.executable, "-c", CONNECT, address, str(port)).strip()


@contextmanager
def listening(node: Node, port: int = 8000) -> Iterator[None]:
    command = ["nsenter", f"--net=/run/netns/{node.name}", sys.executable, "-m", "http.server", str(port)]
    server = subprocess.Popen([*command, "--directory", "/usr/share/common-licenses"], stderr=subprocess.DEVNULL)
    try:
        until(lambda: connect(node, node.address, port) == "open", deadline=10, what="the test's server")
        yield
    finally:
        server.kill()
        server.wait()


def test_nodes_reach_each_other_under_different_interface_names(cluster2: Cluster) -> None:
    first, second = cluster2.nodes
    assert first.interface != second.interface
    with listening(second):
        assert connect(first, second.address) == "open"


def test_a_node_has_no_way_out_of_the_testbed(cluster2: Cluster) -> None:
    routes = json.loads(cluster2.nodes[0].shell("ip", "-j", "route"))
    assert [route["dst"] for route in routes] == [f"10.77.{cluster2.number}.0/24"]


def test_a_cut_link_is_silent_until_it_is_restored(cluster2: Cluster) -> None:
    first, second = cluster2.nodes
    with listening(second):
        second.cut()
        assert connect(first, second.address) == "silent"
        second.restore()
        assert connect(first, second.address) == "open"


def test_a_blocked_port_is_silent_or_refused_and_other_ports_stay_open(cluster2: Cluster) -> None:
    first, second = cluster2.nodes
    with listening(second), listening(second, 8001):
        second.block(8000)
        assert connect(first, second.address) == "silent"
        assert connect(first, second.address, 8001) == "open"
        second.restore()
        second.block(8000, 8001, reject=True)
        assert connect(first, second.address) == "refused"
        second.restore()
        assert connect(first, second.address) == "open"


def test_a_slowed_link_takes_its_time(cluster2: Cluster) -> None:
    first, second = cluster2.nodes
    fetch = f"import urllib.request as u; [u.urlopen('http://{second.address}:8000/GPL-3').read() for _ in range(10)]"
    with listening(second):
        before, moved = time.monotonic(), first.bytes_moved()
        first.shell(sys.executable, "-c", fetch)
        fast, size = time.monotonic() - before, first.bytes_moved() - moved
        second.slow("2mbit")
        before = time.monotonic()
        first.shell(sys.executable, "-c", fetch)
        slow = time.monotonic() - before
    # The bucket lets the first 32 kB through at once.
    assert slow > (size - 64_000) * 8 / 2e6 > fast


def test_an_interface_can_be_renamed_and_others_added(cluster2: Cluster) -> None:
    node = cluster2.nodes[1]
    before = node.interface
    node.rename_interface("ib0")
    try:
        node.add_interface("eth7", "10.78.0.2/24")
        node.add_device("br-lan", "bridge", address="10.79.0.2/24")
        links = {link["ifname"]: link for link in json.loads(node.shell("ip", "-j", "addr"))}
        assert links["ib0"]["addr_info"][0]["local"] == node.address
        assert {"eth7", "br-lan"} <= set(links)
    finally:
        node.shell("ip", "link", "del", "eth7")
        node.shell("ip", "link", "del", "br-lan")
        node.rename_interface(before)


def test_containers_see_the_name_and_hosts_file_of_their_node(cluster2: Cluster) -> None:
    node = cluster2.nodes[0]
    was, hosts = (node.engine.home / "hostname").read_text().strip(), (node.engine.home / "hosts").read_text()
    node.set_host_name("gpu-a", "127.0.0.1 localhost\n127.0.1.1 gpu-a\n")
    try:
        script = "import socket; print(socket.gethostname(), socket.gethostbyname('gpu-a'))"
        assert "gpu-a 127.0.1.1" in node.run("-c", script, options=("--entrypoint", "python")).output
    finally:
        node.set_host_name(was, hosts)


def test_a_stopped_engine_starts_its_containers_again_and_a_killed_one_stays_down(cluster2: Cluster) -> None:
    first, second = cluster2.nodes
    stacks = [node.up({"RESTART": "always"}, files={**SLEEPER, **OVERRIDE}) for node in (first, second)]
    for stack in stacks:
        stack.wait_for("sleeping", 30)
    first.stop_engine()
    second.kill()
    first.start_engine()
    until(lambda: stacks[0].running, deadline=20, what="the restarted container")
    assert stacks[0].wait_for("sleeping", 20, times=2)
    assert stacks[1].wait(10) == 137


def test_waiting_for_a_line_that_never_comes_shows_the_log_at_once_when_the_container_ends(cluster2: Cluster) -> None:
    files = {"workspace/sleep.py": "print('all I say')\n", **OVERRIDE}
    stack = cluster2.nodes[0].up({"RESTART": "no"}, files=files)
    with pytest.raises(BedError, match=r"(?s)ended without 'nothing'.*all I say"):
        stack.wait_for("nothing", 60)


def test_a_crash_takes_every_process_of_the_node_at_once(cluster2: Cluster) -> None:
    node = cluster2.nodes[1]
    stack = node.up(files={**SLEEPER, **OVERRIDE})
    stack.wait_for("sleeping", 30)
    pids = stack.processes()
    assert any("sleep.py" in line for line in pids.values())
    node.crash()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), deadline=5, what="the processes to be gone")


def test_two_testbeds_live_side_by_side(cluster2: Cluster) -> None:
    with cluster(nodes=1, tools=cluster2.tools) as other:
        assert other.number != cluster2.number
        assert other.nodes[0].engine.client.ping()
    assert cluster2.nodes[0].engine.client.ping()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_an_interrupted_run_leaves_nothing_that_runs_and_the_next_one_clears_the_rest(
    cluster2: Cluster, number: signal.Signals
) -> None:
    code = (
        "import time\nfrom tests.testbed import cluster\n"
        "with cluster(nodes=1) as bed:\n    print(bed.name, bed.nodes[0].engine.first_pid, flush=True)\n"
        "    time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name, pid = process.stdout.readline().split()
    process.send_signal(number)
    process.wait(30)
    until(lambda: not Path("/proc", pid).exists(), deadline=10, what="the engine to be gone")
    if number == signal.SIGKILL:
        with cluster(nodes=1, tools=cluster2.tools) as bed:
            assert bed.name == name
    assert remains(name) == []


def remains(name: str) -> list[Path]:
    """Whatever a testbed could have left behind."""
    places = ("/run", "/run/netns", "/sys/class/net", "/sys/fs/cgroup", "/sys/fs/cgroup/memory")
    return [path for place in (*places, cache_folder("nodes")) for path in Path(place).glob(f"{name}*")]


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "sources.list.d/debian.sources",
            "Types: deb\nURIs: http://mirror.example/debian\n",
            "http://mirror.example/debian",
        ),
        (
            "sources.list",
            "deb [arch=amd64] https://proxy.example/debian/ bookworm main\n",
            "https://proxy.example/debian",
        ),
        ("sources.list", "deb http://deb.debian.org/debian-security bookworm-security main\n", DEFAULT_MIRROR),
        ("sources.list.d/other.list", "deb https://deb.example/node_20.x nodistro main\n", DEFAULT_MIRROR),
    ],
)
def test_packages_come_from_the_mirror_of_the_machine(tmp_path: Path, file: str, text: str, expected: str) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / file).write_text(text)
    assert mirror(tmp_path) == expected
