"""A watched job on real engines: who tells of a node 0 that is killed, figures for Prometheus, status and stacks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.faults import TRAINS, up
from tests.testbed import Cluster, Stack
from tests.testbed.shell import until

ENTRYPOINT = "/opt/torchrun-compose/entrypoint.py"
PORT, METRICS = 8099, 9400
SINK = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        with open(sys.argv[3], "ab") as file:
            file.write(content + b"\\n")
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""
Messages = Callable[[], list[dict[str, str]]]


@pytest.fixture
def messages(cluster2: Cluster, tmp_path: Path) -> Iterator[Messages]:
    """Of a service in node 1's network, beside its engine."""
    node, file = cluster2.nodes[1], tmp_path / "messages"
    file.touch()
    command = [
        "nsenter",
        f"--net=/run/netns/{node.name}",
        sys.executable,
        "-c",
        SINK,
        node.address,
        str(PORT),
        str(file),
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as service:
        until(lambda: f":{PORT} " in node.shell("ss", "-Hltn"), deadline=20, what="the service")
        yield lambda: [json.loads(line) for line in file.read_text().splitlines()]
        service.kill()


def ask(stack: Stack, *words: str) -> str:
    return stack.compose("exec", "--no-TTY", "trainer", "python", ENTRYPOINT, *words)


def test_a_killed_node_0_is_told_once_and_prometheus_and_status_see_it(cluster2: Cluster, messages: Messages) -> None:
    service = f"json://{cluster2.nodes[1].address}:{PORT}/"
    env = {"NOTIFY": service, "METRICS_PORT": str(METRICS), "HEARTBEAT_TIMEOUT": "3", "REJOIN_TIMEOUT": "15"}
    first, second = (up(node, cluster2.addresses, env, script=TRAINS) for node in cluster2.nodes)
    for stack in (first, second):
        stack.wait_for("trains: rank")

    scrape = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9400/metrics', timeout=9).read().decode())"
    texts = [stack.compose("exec", "--no-TTY", "trainer", "python", "-c", scrape) for stack in (first, second)]
    for node, text in enumerate(texts):
        labels = f'{{node="{node}",run="default"}}'
        assert f"torchrun_compose_up{labels} 1.0" in text
        assert f"torchrun_compose_running{labels} 1.0" in text
        assert f'torchrun_compose_network_sent_bytes_total{{device="{cluster2.nodes[node].interface}"' in text
    assert 'node_connected{node="0",peer="1",run="default"} 1.0' in texts[0]

    # The file is written every two seconds.
    until(lambda: "step " in ask(second, "status"), deadline=20, what="progress in the status")
    (status,) = json.loads(ask(second, "status", "--json"))
    assert (status["node"], status["state"], status["address"]) == (1, "running", cluster2.nodes[1].address)
    assert status["progress"].startswith("step ")
    ranks = json.loads(ask(first, "stacks", "--json"))
    assert [each["rank"] for each in ranks] == [0]
    assert "train.py" in ranks[0]["at"]

    first.kill()
    until(lambda: "lost a node" in titles(messages), deadline=60, what="the message of the lost node 0")
    assert second.wait(60) == 6
    assert titles(messages).split("\n") == [
        "torchrun-compose: default started",
        "torchrun-compose: default lost a node",
        "torchrun-compose: default failed",
    ]
    told = messages()[1]["message"]
    assert f"node 0 ({cluster2.nodes[0].address}) was lost" in told
    assert f"told by node 1 of 2 ({cluster2.nodes[1].address})" in told
    assert service not in first.logs() + second.logs()


def titles(messages: Messages) -> str:
    return "\n".join(each["title"] for each in messages())


def test_a_lost_node_1_is_told_once_by_node_0(cluster2: Cluster, messages: Messages) -> None:
    env = {"NOTIFY": f"json://{cluster2.nodes[1].address}:{PORT}/", "HEARTBEAT_TIMEOUT": "3"}
    first, second = (up(node, cluster2.addresses, env, script=TRAINS) for node in cluster2.nodes)
    for stack in (first, second):
        stack.wait_for("trains: rank")
    second.kill()
    until(lambda: "lost a node" in titles(messages), deadline=60, what="the message of the lost node 1")
    second.start()
    first.wait_for("trains: rank", times=2)
    first.stop()
    until(lambda: "was stopped" in titles(messages), deadline=30, what="the message of the stop")
    # Whoever would tell it twice, would by now.
    time.sleep(6)
    assert [each["title"].rpartition("default ")[2] for each in messages()] == ["started", "lost a node", "was stopped"]
    assert "told by node 0 of 2" in messages()[1]["message"]
