"""METRICS_PORT: what this node knows of its job and of its machine, for Prometheus."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from app.supervise.files import start_thread
from app.supervise.status import gpu_loads

PREFIX = "torchrun_compose_"
MISSING = "prometheus-client is not installed here: `pip install prometheus-client`, or build the image anew"
CAUSES = ("worker", "lost", "hang", "network")
FIGURES: Mapping[str, tuple[str, str]] = {
    "up": ("gauge", "1 while the launcher of this node lives"),
    "running": ("gauge", "1 while the workers of this node run"),
    "round": ("gauge", "The round of the job"),
    "restarts": ("counter", "Restarts of the job that this launcher has seen, by cause"),
    "hang": ("gauge", "1 while no rank of the job makes progress"),
    "progress_age_seconds": ("gauge", "Seconds since the script last made progress, or since the start"),
    "node_connected": ("gauge", "Whether this node is connected to its peer"),
    "heartbeat_round_trip_seconds": ("gauge", "How long a heartbeat to the peer takes there and back"),
    "gpu_busy_ratio": ("gauge", "Share of the last moments in which the GPU computed"),
    "gpu_memory_used_bytes": ("gauge", "GPU memory in use"),
    "gpu_memory_total_bytes": ("gauge", "GPU memory"),
    "gpu_temperature_celsius": ("gauge", "Temperature of the GPU"),
    "network_received_bytes": ("counter", "Bytes that arrived at a network card or RDMA port"),
    "network_sent_bytes": ("counter", "Bytes that left through it"),
    "step": ("gauge", "The step of the script, where it writes metrics.jsonl"),
    "loss": ("gauge", "The loss, where the script writes it"),
    "tokens_per_second": ("gauge", "Tokens per second of the whole job, where the script writes them"),
}
"""Kind and meaning by name, without PREFIX; a counter's name gets `_total` at its end."""
Sample = tuple[str, dict[str, str], float]


def samples(record: Mapping[str, Any], loads: tuple[Any, ...], now: float) -> Iterator[Sample]:
    """(name, labels, value) of everything that is known: `record` is that of state.py."""
    yield "up", {}, 1
    if not record:
        return
    yield "running", {}, int(record["state"] == "running")
    yield "round", {}, record["round"]
    yield "hang", {}, int(bool(record["hang"]))
    yield "progress_age_seconds", {}, now - max(record["progress_time"], record["started"])
    for cause in CAUSES:
        yield "restarts", {"cause": cause}, record["restarts"].get(cause, 0)
    for peer, trip in record["heartbeats"].items():
        yield "node_connected", {"peer": peer}, int(trip is not None)
        if trip is not None and trip >= 0:
            yield "heartbeat_round_trip_seconds", {"peer": peer}, trip
    for load in loads:
        values = {
            "gpu_busy_ratio": load.busy,
            "gpu_memory_used_bytes": load.used,
            "gpu_memory_total_bytes": load.total,
            "gpu_temperature_celsius": load.temperature,
        }
        yield from ((name, {"gpu": str(load.index)}, value) for name, value in values.items() if value is not None)
    for device, (received, sent) in record["bytes"].items():
        yield "network_received_bytes", {"device": device}, received
        yield "network_sent_bytes", {"device": device}, sent
    yield from ((name, {}, value) for name, value in record["figures"].items())


class Collector:
    """What Prometheus asks for each time."""

    def __init__(self, record: Callable[[], Mapping[str, Any]], labels: Mapping[str, str]) -> None:
        self._record, self._labels = record, labels

    def collect(self) -> Iterator[Any]:
        from prometheus_client import core as client  # type: ignore[import-not-found, unused-ignore]

        families: dict[str, Any] = {}
        for name, labels, value in samples(self._record(), gpu_loads(), time.time()):
            every = {**self._labels, **labels}
            if name not in families:
                kind, meaning = FIGURES[name]
                make = client.CounterMetricFamily if kind == "counter" else client.GaugeMetricFamily
                families[name] = make(PREFIX + name, meaning, labels=[*every])
            families[name].add_metric([*every.values()], value)
        return iter(families.values())


def serve(
    address: str,
    port: int,
    record: Callable[[], Mapping[str, Any]],
    labels: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Answers http://ADDRESS:PORT/metrics until this process ends, in threads. Says why, where that cannot be."""

    def begin() -> None:
        try:
            from prometheus_client import (  # type: ignore[import-not-found, unused-ignore]
                CollectorRegistry,
                start_http_server,
            )

            registry = CollectorRegistry(auto_describe=False)
            registry.register(Collector(record, labels))
            start_http_server(port, address, registry)
        except ImportError:
            say(f"warning: no figures for Prometheus (METRICS_PORT): {MISSING}")
        except OSError as error:
            say(f"warning: no figures for Prometheus: {address} port {port} (METRICS_PORT): {error.strerror}")

    start_thread(begin, "prometheus")
