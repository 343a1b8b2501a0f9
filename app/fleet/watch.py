"""`watch`: the table of `status` again and again with curves, in the terminal or as a page on the desk's loopback."""

import asyncio
import json
import shutil
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from app.config.errors import UserError
from app.config.options import Parser
from app.config.parsers import Malformed, seconds, whole_number
from app.config.table import columns
from app.fleet.hosts import Desk
from app.fleet.status import NodeStatus, as_data, busy, look, table

PAGE = Path(__file__).with_name("watch.html")
EVERY = "3"
PORT = "8900"
KEPT = 1200
"""Points of a curve: an hour at three seconds."""
BARS = "▁▂▃▄▅▆▇█"
ALTERNATE, BACK, HOME, TO_END = "\033[?1049h\033[?25l", "\033[?25h\033[?1049l", "\033[H", "\033[J"
CURVES = ("loss", "tokens_per_second")


class History:
    """The newest points of all curves, by name."""

    def __init__(self) -> None:
        self.curves: dict[str, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=KEPT))

    def add(self, seen: Sequence[NodeStatus], now: float) -> None:
        for each in seen:
            if each.status is None:
                continue
            points = {name: each.status["figures"].get(name) for name in CURVES}
            points |= {f"GPU {each.host.name}": busy(each.status)}
            for name, value in points.items():
                if value is not None:
                    self.curves[name].append((now, value))


def watch(desk: Desk, arguments: Sequence[str]) -> int:
    """Until Ctrl-C, which ends the watching alone."""
    parser = Parser(prog="watch", description="The table of `status` with curves, until Ctrl-C; the job goes on.")
    parser.add_argument("--web", action="store_true", help="as a page for this machine's browser")
    parser.add_argument("--port", default=PORT, help=f"of the page, on the loopback ({PORT})")
    parser.add_argument("--every", metavar="SECONDS", default=EVERY, help=f"between two looks ({EVERY})")
    wanted = parser.read(arguments)
    try:
        pause, port = seconds(1)(wanted.every), whole_number(0, 65535)(wanted.port)
    except Malformed:
        raise UserError("--every is a number of seconds of at least 1, --port one from 0 to 65535.") from None
    return serve(desk, pause, port) if wanted.web else show(desk, pause)


async def keep_looking(desk: Desk, pause: float, tell: Callable[[Sequence[NodeStatus], History], None]) -> None:
    history = History()
    while True:
        began = time.monotonic()
        seen = await look(desk)
        history.add(seen, time.time())
        tell(seen, history)
        await asyncio.sleep(max(0.2, pause - (time.monotonic() - began)))


def show(desk: Desk, pause: float) -> int:
    terminal = sys.stdout.isatty()

    def draw(seen: Sequence[NodeStatus], history: History) -> None:
        width, height = shutil.get_terminal_size()
        lines = screen(seen, history, width if terminal else 120)
        cut = [line[:width] + "\033[K" for line in lines][: height - 1] if terminal else [*lines, ""]
        print((HOME if terminal else "") + "\n".join(cut) + (TO_END if terminal else ""), flush=True)

    if terminal:
        print(ALTERNATE + HOME + "asking all hosts ...", end="", flush=True)
    try:
        asyncio.run(keep_looking(desk, pause, draw))
    except KeyboardInterrupt:
        pass
    finally:
        if terminal:
            print(BACK, end="", flush=True)
    print("no longer watching; the job goes on")
    return 0


def screen(seen: Sequence[NodeStatus], history: History, width: int) -> list[str]:
    """The table, and below it one line for each curve."""
    rows = [(name, f"{points[-1][1]:,.4g}", points) for name, points in history.curves.items()]
    room = max(10, width - max((len(name) + len(last) for name, last, _ in rows), default=0) - 4)
    curves = columns([(name, last, bars([value for _, value in points], room)) for name, last, points in rows])
    return [time.strftime("%H:%M:%S"), "", *table(seen), "", *curves]


def bars(values: Sequence[float], width: int) -> str:
    """The newest values, one character each, from the lowest to the highest of them."""
    shown = values[-width:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return "".join(BARS[round((value - low) / (high - low) * 7) if high > low else 0] for value in shown)


class Page(BaseHTTPRequestHandler):
    """`/` is the page, `/data` what it shows."""

    def __init__(self, newest: Callable[[], bytes], *arguments: object) -> None:
        self.newest = newest
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        # A name that somebody else lets point to the loopback is not asked for here.
        if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(403)
        elif self.path == "/":
            self._answer(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/data":
            self._answer(self.newest(), "application/json")
        else:
            self.send_error(404)

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """The terminal is the desk's."""


def serve(desk: Desk, pause: float, port: int) -> int:
    newest = [b"{}"]

    def keep(seen: Sequence[NodeStatus], history: History) -> None:
        curves = {name: [*points] for name, points in history.curves.items()}
        newest[0] = json.dumps({"time": time.time(), "hosts": as_data(seen), "curves": curves}).encode()

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(Page, lambda: newest[0]))
    except OSError as error:
        raise UserError(f"127.0.0.1 port {port}: {error.strerror}. --port names another.") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}/ until Ctrl-C; the job goes on", flush=True)
    try:
        asyncio.run(keep_looking(desk, pause, keep))
    except KeyboardInterrupt:
        pass
    finally:
        server.shutdown()
    return 0
