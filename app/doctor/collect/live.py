"""The few live facts that only doctor wants, besides those of `app.host`. Reads below a `root`; no decisions."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TypeVar

from app.doctor.collect.engine import engine_versions
from app.host import Host
from app.host.accelerators import read_state
from app.host.accelerators.gpu import GpuState
from app.host.addresses import canonical
from app.host.files import entries, number, text

NIC_COUNTERS = ("rx_errors", "tx_errors", "rx_crc_errors", "rx_missed_errors", "tx_carrier_errors")
PROBE_BYTES = 32 << 20
PROBE_SECONDS = 0.4
PROBE_LIMIT = 1.0
"""Seconds after which a write that does not come back is left alone: a dead NFS server must not stop doctor."""
STAT_LIMIT = 5.0
"""Seconds for a file system to say that it is there: one that is mounted on demand takes a few."""
BUSY_DISK = 50e6
"""Bytes per second below which a second look is taken."""
LISTEN = "0A"

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class NicHealth:
    """One interface since it came up."""

    duplex: str
    packets: int
    errors: Mapping[str, int]
    """Counters of NIC_COUNTERS that are not 0."""
    flaps: int
    """How often the link went down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDisk:
    """The file system below the checkpoint folder."""

    folder: str
    """The nearest folder that exists: checkpoints and run are made below it at the start."""
    free: int = 0
    """Bytes."""
    total: int = 0
    inodes: int | None = None
    """Free ones; None where the file system does not count them."""
    speed: float | None = None
    """Bytes per second of a short write with fsync; None if it did not end in PROBE_LIMIT seconds or failed."""
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFacts:
    """Live facts of this node."""

    nics: Mapping[str, NicHealth] = field(default_factory=dict)
    rdma: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By port (`mlx5_0:1`): error counters that are not 0."""
    disk: CheckpointDisk | None = None
    listening: frozenset[tuple[str, int]] = frozenset()
    """(address, port) of every listening TCP socket of this network namespace."""
    clock_source: str = ""
    gpus: GpuState = field(default_factory=GpuState)
    engine: Mapping[str, str] = field(default_factory=dict)
    """Versions of the container engine and its parts, by name; "" for one that gives none."""


def collect(root: Path, host: Host, folder: Path | None) -> LiveFacts:
    """Reads below `root`; `folder` is where checkpoints go, None to leave the disk alone. Takes about a second."""
    return LiveFacts(
        nics={nic.name: _nic(root / "sys/class/net" / nic.name) for nic in host.nics if nic.kind != "loopback"},
        rdma={
            port.name: _rdma(root / "sys/class/infiniband" / port.device / "ports" / str(port.port))
            for port in host.rdma_ports
        },
        disk=None if folder is None else probe_disk(folder),
        listening=frozenset(_listening(root)),
        clock_source=text(root / "sys/devices/system/clocksource/clocksource0/current_clocksource") or "",
        gpus=read_state(root, host.gpus),
        engine=engine_versions() if root == Path("/") else {},
    )


def _nic(folder: Path) -> NicHealth:
    counts = {name: number(folder / "statistics" / name) or 0 for name in NIC_COUNTERS}
    packets = sum(number(folder / "statistics" / name) or 0 for name in ("rx_packets", "tx_packets"))
    return NicHealth(
        duplex=text(folder / "duplex") or "",
        packets=packets,
        errors={name: count for name, count in counts.items() if count},
        flaps=number(folder / "carrier_down_count") or 0,
    )


def _rdma(port: Path) -> dict[str, int]:
    counts = {
        name: number(port / leaf / name) or 0 for leaf in ("counters", "hw_counters") for name in entries(port / leaf)
    }
    return {name: count for name, count in counts.items() if count}


def _listening(root: Path) -> Iterable[tuple[str, int]]:
    for name in ("tcp", "tcp6"):
        for line in (text(root / "proc/net" / name) or "").splitlines()[1:]:
            words = line.split()
            if len(words) > 3 and words[3] == LISTEN:
                address, _, port = words[1].partition(":")
                yield _unhex(address), int(port, 16)


def _unhex(digits: str) -> str:
    # The kernel prints 32-bit words in its own byte order: reversed on x86 and arm64.
    raw = b"".join(bytes.fromhex(digits[start : start + 8])[::-1] for start in range(0, len(digits), 8))
    return canonical(str(ip_address(raw)))


def probe_disk(folder: Path) -> CheckpointDisk:
    """Free space, and a short write, at the nearest folder that exists. Leaves nothing behind; never raises."""
    try:
        place, found = within(STAT_LIMIT, lambda: _file_system(folder))
    except TimeoutError:
        return CheckpointDisk(folder=str(folder), failure=f"no answer within {STAT_LIMIT:.0f} s")
    except OSError as error:
        return CheckpointDisk(folder=str(folder), failure=error.strerror or str(error))
    speed, failure = _probe_within_limit(place)
    if not failure and (speed is None or speed < BUSY_DISK):
        # What else writes at this moment is no fault of the disk: the better of two looks counts.
        again, failure = _probe_within_limit(place)
        speed = max((each for each in (speed, again) if each is not None), default=None)
    return CheckpointDisk(
        folder=str(place),
        free=found.f_bavail * found.f_frsize,
        total=found.f_blocks * found.f_frsize,
        inodes=found.f_favail if found.f_files else None,
        speed=speed,
        failure=failure,
    )


def within(seconds: float, work: Callable[[], Answer]) -> Answer:
    """What `work` returns. Raises its OSError, and TimeoutError after `seconds`: a call to a dead NFS server cannot be
    ended, so its thread is left alone."""
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except OSError as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(seconds)


def _file_system(folder: Path) -> tuple[Path, os.statvfs_result]:
    # is_dir takes "not there" for False, but raises for a folder that may not be entered and for a stale NFS mount.
    place = next(each for each in (folder, *folder.parents) if each.is_dir())
    return place, os.statvfs(place)


def _probe_within_limit(place: Path) -> tuple[float | None, str]:
    try:
        return within(PROBE_LIMIT, lambda: _write_speed(place))
    except TimeoutError:
        return None, ""


def _write_speed(place: Path) -> tuple[float | None, str]:
    # Not zeros: a file system that compresses would be measured wrong.
    block = os.urandom(1 << 20) * 4
    start, written = time.monotonic(), 0
    try:
        with tempfile.TemporaryFile(dir=place, prefix=".doctor-") as file:
            while written < PROBE_BYTES and time.monotonic() < start + PROBE_SECONDS:
                written += file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return None, error.strerror or str(error)
    return written / max(time.monotonic() - start, 1e-6), ""
