"""The page of `watch --web` in a real browser: it loads, follows the job, survives a node's death."""

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer

import pytest

from app.fleet.hosts import Host
from app.fleet.status import NodeStatus, as_data
from app.fleet.watch import Page
from tests.testbed import BedError
from tests.testbed.browser import page_text
from tests.unit.test_desk_watch import STATUS


class Job:
    """Two nodes; the second dies after two looks."""

    def __init__(self) -> None:
        self.looks = 0

    def newest(self) -> bytes:
        self.looks += 1
        hosts = [Host(name=name, rank=rank) for rank, name in enumerate(("gpu-a", "gpu-b"))]
        words = {"last_words": f"<script>document.title = 'taken over'</script> look {self.looks}"}
        seen = [
            NodeStatus(host=hosts[0], status={**STATUS, **words}),
            NodeStatus(host=hosts[1], status={**STATUS, "node": 1}),
        ]
        if self.looks > 2:
            seen[1] = NodeStatus(host=hosts[1], status=None, why="gpu-b does not answer")
        curves = {"loss": [(step, 3 - step / 100) for step in range(100)]}
        return json.dumps({"time": time.time(), "hosts": as_data(seen), "curves": curves}).encode()


@pytest.fixture
def job() -> Iterator[tuple[Job, str]]:
    made = Job()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Page, made.newest))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def seen_by_browser(url: str, seconds: int) -> str:
    try:
        return page_text(url, seconds)
    except BedError as error:
        pytest.skip(f"no browser: {error}")


def test_the_page_shows_the_job_and_its_curves(job: tuple[Job, str]) -> None:
    text = seen_by_browser(job[1], 1)
    assert '<td class="running">running</td>' in text
    assert "<td>180,000</td>" in text
    assert "loss: 2.01" in text
    assert "<polyline points=" in text
    assert ">no job<" not in text


def test_the_page_follows_the_job_and_survives_the_death_of_a_node(job: tuple[Job, str]) -> None:
    text = seen_by_browser(job[1], 9)
    assert job[0].looks > 3
    assert f"look {job[0].looks}" in text
    assert '<td class="none">no job</td>' in text
    assert "gpu-b does not answer" in text
    assert '<td class="running">running</td>' in text
    # What a node says is text, and acts nowhere.
    assert "<title>torchrun-compose</title>" in text
    assert "&lt;script&gt;document.title" in text
