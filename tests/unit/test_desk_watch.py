"""What the desk makes of the nodes' status: rows, curves of bounded length, the page for the loopback alone."""

import http.client
import json
import re
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.config.settings import read_settings
from app.fleet import status
from app.fleet.hosts import Desk, Host
from app.fleet.remote import Result, explain_failure
from app.fleet.stack import exports
from app.fleet.status import HEAD, NodeStatus
from app.fleet.watch import KEPT, History, Page, bars, screen

FIRST, SECOND = Host(name="gpu-a", rank=0), Host(name="gpu-b", rank=1)
STATUS: dict[str, Any] = {
    "node": 0,
    "nodes": 2,
    "state": "running",
    "round": 2,
    "restarts": {"lost": 1, "worker": 2},
    "hang": "",
    "progress": "step 7",
    "progress_time": 980.0,
    "time": 1000.0,
    "figures": {"loss": 1.25, "tokens_per_second": 180_000.0},
    "bytes_per_second": {"eth0": [1e6, 2e6], "mlx5_0:1": [3e6, 4e6]},
    "gpus": [
        {"index": 0, "busy": 0.5, "used": 10, "total": 40, "temperature": 61},
        {"index": 1, "busy": 1.0, "used": 30, "total": 40, "temperature": None},
    ],
    "last_words": "at step 7",
}


def result(host: Host, out: object = b"", code: int = 0, err: str = "") -> Result:
    failure = explain_failure(host, code, err) if code else None
    content = out if isinstance(out, bytes) else json.dumps(out).encode()
    return Result(host=host, code=code, out=content, err=err, seconds=0.1, failure=failure)


def test_a_row_has_what_a_node_told() -> None:
    cells = dict(zip(HEAD, status.row(NodeStatus(host=FIRST, status=STATUS)), strict=True))
    assert (cells["node"], cells["state"], cells["restarts"]) == ("0 of 2", "running", "1 lost, 2 worker")
    assert (cells["progress"], cells["loss"], cells["tokens/s"]) == ("step 7, 20 s ago", "1.25", "180,000")
    assert (cells["GPU"], cells["memory"], cells["heat"]) == ("75%", "50%", "61")
    assert (cells["in"], cells["out"]) == ("4.0 MB/s", "6.0 MB/s")


def test_a_row_of_a_node_that_tells_little_has_dashes() -> None:
    bare = {**STATUS, "figures": {}, "gpus": [], "progress": "", "bytes_per_second": {}, "restarts": {}}
    cells = dict(zip(HEAD, status.row(NodeStatus(host=FIRST, status=bare)), strict=True))
    assert {cells[name] for name in ("progress", "loss", "tokens/s", "GPU", "memory", "heat")} == {"-"}


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (result(SECOND, [], 1), "nothing runs"),
        (result(SECOND, b"", 1, 'service "trainer" is not running'), "nothing runs"),
        (result(SECOND, b"", 255, "ssh: connect to host gpu-b port 22: No route to host"), "gpu-b does not answer"),
        (result(SECOND, b"{torn"), "nothing runs"),
    ],
)
def test_a_host_without_a_job_says_why(told: Result, why: str) -> None:
    seen = status._seen(told)
    assert seen.status is None
    assert why in seen.why
    assert "no job" in "\n".join(status.table([NodeStatus(host=FIRST, status=STATUS), seen]))


def test_what_a_node_tells_cannot_act_on_this_terminal() -> None:
    seen = status._seen(result(FIRST, [{**STATUS, "last_words": "\x1b]0;evil\x07\x1b[2J"}]))
    assert "\x1b" not in "\n".join(status.table([seen]))


def test_ranks_of_all_hosts_with_the_same_stacks_stand_together() -> None:
    told = [{"host": "gpu-a", "rank": 0, "text": "at x"}, {"host": "gpu-b", "rank": 1, "text": "at x"}]
    assert status.together(told) == "rank 0 (gpu-a), rank 1 (gpu-b) at x"


def test_curves_keep_their_newest_points_alone() -> None:
    history = History()
    for step in range(KEPT + 50):
        figures = {"loss": float(step)}
        history.add(
            [NodeStatus(host=FIRST, status={**STATUS, "figures": figures}), NodeStatus(host=SECOND, status=None)], step
        )
    assert set(history.curves) == {"loss", "GPU gpu-a"}
    assert len(history.curves["loss"]) == KEPT
    assert history.curves["loss"][-1] == (KEPT + 49, KEPT + 49)
    drawn = screen([NodeStatus(host=FIRST, status=STATUS)], history, 80)
    assert any(line.startswith("loss") and line.endswith("█") for line in drawn)


def test_a_curve_goes_from_its_lowest_to_its_highest() -> None:
    assert bars([0, 1, 2, 3.5, 7], 4) == "▁▂▄█"
    assert bars([5, 5], 9) == "▁▁"
    assert bars([], 9) == ""


def test_what_is_secret_is_not_handed_on_in_the_command_line_of_ssh(tmp_path: Path) -> None:
    settings = read_settings({"NOTIFY": "json://host/key", "RUN_NAME": "mine"}, None)
    made = Desk(project=tmp_path, settings=settings, hosts=(FIRST,), folder="here")
    assert exports(made, FIRST, {}) == {"RUN_NAME": "mine"}


@pytest.mark.parametrize(
    ("host", "path", "code", "kind"),
    [
        ("127.0.0.1:1", "/", 200, "text/html; charset=utf-8"),
        ("localhost:1", "/data", 200, "application/json"),
        ("127.0.0.1:1", "/../.env", 404, ""),
        ("evil.example:1", "/data", 403, ""),
    ],
)
def test_the_page_is_for_the_loopback_alone(host: str, path: str, code: int, kind: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Page, lambda: b"{}"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        assert answer.status == code
        if kind:
            assert answer.headers["Content-Type"] == kind
        connection.close()
    finally:
        server.shutdown()
        server.server_close()


def test_the_page_puts_no_text_of_a_node_into_its_markup() -> None:
    page = Path(status.__file__).with_name("watch.html").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval", page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
