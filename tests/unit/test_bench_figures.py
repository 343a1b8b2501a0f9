"""What the bench concludes from its figures: bandwidths, slow nodes, changes against a baseline, the link's rate."""

import argparse
import io
import json
import re
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from app.bench.__main__ import main, options, size
from app.bench.chart import BOTTOM, COLOURS, LEFT, LINK, RIGHT, TOP, bandwidth_chart
from app.bench.figures import Findings, Measure, PairSpeed, readable_rate, readable_size
from app.bench.report import as_json, keep, publish, render, sentence
from app.bench.verdict import changes, key_figures, of_link, slow_pairs, slow_parts
from app.host.links import Link, read_link

NAMES = ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")
NAMES_OF_CARDS = ("mlx5_0", "mlx5_1", "mlx5_10", "rdmap0s31")
FULL, TENTH = 1.2e9, 1.2e8


def pairs(nodes: int, slow: dict[tuple[int, int], float] | None = None) -> tuple[PairSpeed, ...]:
    """Every direction between `nodes`, a little uneven, with the bandwidths of `slow`."""
    slow = slow or {}
    return tuple(
        PairSpeed(
            source=source,
            target=target,
            bandwidth=slow.get((source, target), FULL * (1 - 0.03 * ((source + 2 * target) % 4))),
            latency=2e-5,
        )
        for source, target in permutations(range(nodes), 2)
    )


def measure(collective: str, seconds: float, *, ranks: int = 4, size: int = 1 << 20, correct: bool = True) -> Measure:
    return Measure(collective=collective, ranks=ranks, size=size, seconds=seconds, correct=correct)


def findings(*measures: Measure, speeds: tuple[PairSpeed, ...] = (), nodes: int = 2) -> Findings:
    return Findings(
        nodes=NAMES[:nodes],
        ranks=4,
        backend="gloo",
        device="cpu",
        links=tuple(Link(name="eth0", rate=1.25e9) for _ in range(nodes)),
        pairs=speeds,
        measures=measures,
        unsupported=(),
        cut_short=(),
    )


@pytest.mark.parametrize(
    ("collective", "factor"),
    [
        ("all_reduce", 2 * 3 / 4),
        ("all_gather", 3 / 4),
        ("reduce_scatter", 3 / 4),
        ("all_to_all", 3 / 4),
        ("broadcast", 1),
        ("send_recv", 1),
    ],
)
def test_the_bus_bandwidth_is_that_of_nccl_tests(collective: str, factor: float) -> None:
    one = measure(collective, 0.5, size=2_000_000_000)
    assert one.algorithm_bandwidth == pytest.approx(4e9)
    assert one.bus_bandwidth == pytest.approx(4e9 * factor)


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_a_healthy_cluster_has_no_slow_part(nodes: int) -> None:
    assert slow_parts(findings(speeds=pairs(nodes), nodes=nodes)) == ()


@pytest.mark.parametrize("nodes", [3, 4])
@pytest.mark.parametrize("way", ["sends", "receives", "sends and receives"])
def test_a_slow_node_is_named_with_its_direction(nodes: int, way: str) -> None:
    for node in range(nodes):
        slow = {
            (source, target): TENTH
            for source, target in permutations(range(nodes), 2)
            if (source == node and "sends" in way) or (target == node and "receives" in way)
        }
        found = findings(speeds=pairs(nodes, slow), nodes=nodes)
        (part,) = slow_parts(found)
        assert (part.id, part.nodes, part.way, part.severe) == ("slow-node", (node,), way, True)
        assert sentence(part, found).startswith(
            f"node {node} ({NAMES[node]}) {way} slowly: 0.12 GB/s with every other node"
        )


def test_a_single_slow_path_is_named_by_both_ends() -> None:
    found = findings(speeds=pairs(4, {(1, 3): TENTH}), nodes=4)
    (part,) = slow_parts(found)
    assert (part.id, part.nodes, part.bandwidth) == ("slow-path", (1, 3), TENTH)
    assert sentence(part, found).startswith("From node 1 (10.0.0.2) to node 3 (10.0.0.4): 0.12 GB/s")


def test_two_nodes_cannot_be_told_apart_so_the_path_is_named() -> None:
    (part,) = slow_parts(findings(speeds=pairs(2, {(0, 1): TENTH})))
    assert (part.id, part.nodes) == ("slow-path", (0, 1))


def test_two_nodes_on_a_link_at_a_twelfth_of_its_rate_are_no_healthy_cluster_nor_a_baseline(tmp_path: Path) -> None:
    both = {(0, 1): 1e8, (1, 0): 1.05e8}
    found = findings(measure("all_reduce", 0.001), speeds=pairs(2, both))
    parts = slow_parts(found)
    assert [(part.id, part.nodes, part.expected) for part in parts] == [
        ("below-link", (0, 1), 1.25e9),
        ("below-link", (1, 0), 1.25e9),
    ]
    assert sentence(parts[0], found).startswith(
        "From node 0 (10.0.0.1) to node 1 (10.0.0.2): 0.10 GB/s, 8 % of the link's 1.25 GB/s."
    )
    assert "SLOW: From node 0" in render(found)
    assert "not kept as a baseline" in keep(found, tmp_path)[0]


@pytest.mark.parametrize(
    ("backend", "link", "reached", "told"),
    [
        ("gloo", 1.25e9, 0.2e9, False),  # half of what is asked of NCCL, since Gloo shares the CPUs
        ("gloo", 1.25e9, 0.18e9, True),
        ("gloo", 125e6, 80e6, False),  # no CPU is the limit of 1 Gb/s
        ("gloo", 125e6, 60e6, True),
        ("nccl", 50e9, 0.4e9, False),
        ("nccl", 50e9, 0.3e9, True),
        ("gloo", None, 1e6, False),
    ],
)
def test_no_more_is_asked_of_a_link_than_one_stream_gives(
    backend: str, link: float | None, reached: float, told: bool
) -> None:
    alike = findings(speeds=pairs(2, {(0, 1): reached, (1, 0): reached}))
    found = replace(alike, backend=backend, links=(Link(name="a", rate=link), Link(name="b", rate=link)))
    assert bool(slow_parts(found)) == told


@pytest.mark.parametrize(("backend", "told"), [("gloo", False), ("nccl", True)])
def test_busy_cpus_are_no_slow_path_of_gloo(backend: str, told: bool) -> None:
    # Measured on 4 equal nodes on 2 busy cores, in MB/s.
    rates = (690, 755, 875, 919, 994, 1361, 1374, 1582, 1835, 1885, 2032, 2168)
    speeds = pairs(4, {edge: 1e6 * rate for edge, rate in zip(permutations(range(4), 2), rates, strict=True)})
    assert bool(slow_parts(replace(findings(speeds=speeds, nodes=4), backend=backend))) == told


def test_a_whole_cluster_below_its_links_is_one_sentence() -> None:
    found = findings(speeds=pairs(4, dict.fromkeys(permutations(range(4), 2), 5e7)), nodes=4)
    (part,) = slow_parts(found)
    assert (part.id, part.nodes, part.paths) == ("all-below-link", (0, 1, 2, 3), 12)
    assert sentence(part, found).startswith("12 of 12 paths stay far below what their links promise, the slowest from")


@pytest.mark.parametrize(("reached", "severe"), [(100e6, True), (200e6, False)])
def test_a_path_below_a_third_of_what_is_asked_is_severe(reached: float, severe: bool) -> None:
    (part,) = slow_parts(replace(findings(speeds=pairs(2, {(0, 1): reached})), backend="nccl"))
    assert part.severe == severe


def test_pairs_below_their_link_are_measured_again() -> None:
    links = (Link(name="eth0", rate=1.25e9),) * 2
    assert len(slow_pairs(pairs(2, {(0, 1): 1e8, (1, 0): 1e8}), links, "gloo")) == 2
    assert slow_pairs(pairs(2), links, "gloo") == ()


def test_one_node_has_no_pairs_and_no_slow_part() -> None:
    assert slow_parts(findings(nodes=1)) == ()


def test_changes_beyond_a_quarter_are_told_worst_first_and_smaller_ones_are_not() -> None:
    before = key_figures(
        findings(measure("all_reduce", 0.001), measure("broadcast", 0.001), measure("all_gather", 0.001))
    )
    after = findings(measure("all_reduce", 0.0005), measure("broadcast", 0.002), measure("all_gather", 0.0011))
    lines = changes(after, before)
    assert lines[0] == "broadcast latency, at 1 MiB: 2000 us, baseline 1000 us (+100%)"
    assert lines[1] == "broadcast, bus bandwidth at 1 MiB: 0.52 GB/s, baseline 1.05 GB/s (-50%)"
    assert [line.partition(",")[0] for line in lines[2:]] == ["all_reduce latency", "all_reduce"]


def test_only_the_largest_common_size_is_compared() -> None:
    before = key_figures(findings(measure("broadcast", 0.01, size=1 << 22), measure("broadcast", 0.001)))
    after = findings(
        measure("broadcast", 0.1, size=1 << 24), measure("broadcast", 0.02, size=1 << 22), measure("broadcast", 0.001)
    )
    assert changes(after, before) == ("broadcast, bus bandwidth at 4 MiB: 0.21 GB/s, baseline 0.42 GB/s (-50%)",)


def test_the_first_good_result_is_the_baseline_and_stays_it(tmp_path: Path) -> None:
    first, second = findings(measure("all_reduce", 0.001)), findings(measure("all_reduce", 0.01))
    assert "Kept as the baseline" in keep(first, tmp_path)[0]
    told = keep(second, tmp_path)
    assert "all_reduce, bus bandwidth at 1 MiB: 0.16 GB/s, baseline 1.57 GB/s (-90%)" in told[1] + told[2]
    assert json.loads((tmp_path / "result.json").read_text())["measures"][0]["seconds"] == 0.01
    assert "no figure differs by more than a quarter" in keep(first, tmp_path)[1]


@pytest.mark.parametrize("bad", ["wrong", "slow"])
def test_a_bad_result_is_never_the_baseline(tmp_path: Path, bad: str) -> None:
    speeds = pairs(2, {(0, 1): TENTH}) if bad == "slow" else ()
    told = keep(findings(measure("all_reduce", 0.001, correct=bad != "wrong"), speeds=speeds), tmp_path)
    assert "not kept as a baseline" in told[0]
    assert not list(tmp_path.glob("baseline*"))


def test_the_table_is_printed_although_the_run_folder_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    publish(findings(measure("all_reduce", 0.001)), tmp_path / "runs/bench")
    told = capsys.readouterr().out
    assert re.search(r"^all_reduce +1 MiB ", told, re.MULTILINE)
    assert "The figures above are not kept" in told.splitlines()[-1]


def test_without_pillow_there_is_no_picture_but_all_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "app.bench.chart", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    told = keep(findings(measure("all_reduce", 0.001)), tmp_path)
    assert "Kept as the baseline" in told[0]
    assert "; no bandwidth.png (" in told[1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["baseline-2x4-gloo-cpu.json", "result.json"]


def test_another_kind_of_gpu_has_a_baseline_of_its_own(tmp_path: Path) -> None:
    for device in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"):
        assert (
            "Kept as the baseline" in keep(replace(findings(measure("all_reduce", 0.001)), device=device), tmp_path)[0]
        )


def test_another_number_of_ranks_has_a_baseline_of_its_own(tmp_path: Path) -> None:
    keep(findings(measure("all_reduce", 0.001)), tmp_path)
    assert "Kept as the baseline" in keep(replace(findings(measure("all_reduce", 0.1)), ranks=8), tmp_path)[0]


def test_the_report_says_wrong_results_unsupported_collectives_and_shares_of_the_link() -> None:
    text = render(
        replace(
            findings(measure("broadcast", 0.001), measure("all_reduce", 0.001, correct=False), speeds=pairs(2)),
            unsupported=("all_to_all",),
            cut_short=("all_reduce",),
        )
    )
    assert "WRONG RESULTS: all_reduce. Do not train on this cluster" in text
    assert re.search(r"^all_to_all +not supported by gloo", text, re.MULTILINE)
    assert "84%  right" in text
    assert re.search(r"node 0 to node 1: +1.13 GB/s +90% of the link", text)
    assert "No node or path is slower than the others" in text


def test_the_share_of_the_link_is_that_of_the_slowest_and_unknown_if_one_is_unknown() -> None:
    one = replace(findings(), links=(Link(name="eth0", rate=1e9), Link(name="eth0", rate=2e9)))
    assert of_link(5e8, one) == pytest.approx(0.5)
    assert of_link(5e8, one, (1,)) == pytest.approx(0.25)
    assert of_link(5e8, replace(one, links=(Link(name="eth0", rate=1e9), Link(name="", rate=None)))) is None
    assert of_link(5e8, findings(nodes=1)) is None


def test_the_json_carries_both_bandwidths_and_the_verdict() -> None:
    found = as_json(findings(measure("all_reduce", 0.001), speeds=pairs(2, {(0, 1): TENTH})))
    assert found["measures"][0]["bus_bandwidth"] == pytest.approx(1.5 * found["measures"][0]["algorithm_bandwidth"])
    assert found["good"] is False
    assert [(part["id"], part["nodes"], part["severe"]) for part in found["slow"]] == [("slow-path", (0, 1), True)]
    assert json.loads(json.dumps(found))["pairs"][0]["source"] == 0


def test_the_picture_has_a_curve_per_collective_within_its_frame_and_the_link_as_a_line() -> None:
    measures = [
        measure(name, 1e-4 + size / 1e9, size=size)
        for name in ("all_reduce", "broadcast")
        for size in (1 << 10, 1 << 20)
    ]
    picture = Image.open(io.BytesIO(bandwidth_chart(findings(*measures)))).convert("RGB")
    for colour in (*COLOURS[:2], LINK):
        curve = [
            (x, y)
            for x in range(RIGHT)
            for y in range(picture.height)
            if picture.getpixel((x, y)) == ImageColor.getrgb(colour)
        ]
        assert min(x for x, _ in curve) <= LEFT + 2
        assert max(x for x, _ in curve) >= RIGHT - 2
        assert all(x >= LEFT - 2 and TOP <= y <= BOTTOM for x, y in curve)
    assert ImageColor.getrgb(COLOURS[2]) not in {pixel for _, pixel in picture.getcolors(1 << 20) or ()}


def made_up_sys(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "sys/class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_gloo_is_measured_against_the_interface_of_the_launcher(tmp_path: Path) -> None:
    root = made_up_sys(tmp_path, {"net/eth0/speed": "25000", "net/veth/speed": "-1"})
    assert read_link({"GLOO_SOCKET_IFNAME": "eth0"}, backend="gloo", root=root) == Link(name="eth0", rate=25e9 / 8)
    assert read_link({"GLOO_SOCKET_IFNAME": "veth"}, backend="gloo", root=root) == Link(name="veth", rate=None)
    assert read_link({}, backend="gloo", root=root) == Link(name="", rate=None)


def test_nccl_is_measured_against_its_active_rdma_ports_together(tmp_path: Path) -> None:
    root = made_up_sys(
        tmp_path,
        {
            "net/eth0/speed": "25000",
            **{f"infiniband/{name}/ports/1/rate": "400 Gb/sec (4X NDR)" for name in NAMES_OF_CARDS},
            **{f"infiniband/{name}/ports/1/link_layer": "InfiniBand" for name in NAMES_OF_CARDS[:3]},
            "infiniband/rdmap0s31/ports/1/link_layer": "Unknown",
            "infiniband/rdmap0s31/ports/1/state": "4: ACTIVE",
            "infiniband/mlx5_0/ports/1/state": "4: ACTIVE",
            "infiniband/mlx5_1/ports/1/state": "1: DOWN",
            "infiniband/mlx5_10/ports/1/state": "4: ACTIVE",
        },
    )
    both = Link(name="mlx5_0:1+mlx5_10:1", rate=100e9)
    assert read_link({}, backend="nccl", root=root) == both
    assert read_link({"NCCL_IB_HCA": "mlx5"}, backend="nccl", root=root) == both
    assert read_link({"NCCL_IB_HCA": "=mlx5_10:1"}, backend="nccl", root=root) == Link(name="mlx5_10:1", rate=50e9)
    assert read_link({"NCCL_IB_HCA": "^=mlx5_10"}, backend="nccl", root=root) == Link(name="mlx5_0:1", rate=50e9)
    sockets = {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert read_link(sockets, backend="nccl", root=root) == Link(name="eth0", rate=25e9 / 8)


@pytest.mark.parametrize(("text", "expected"), [("4096", 4096), ("64K", 65536), ("1MiB", 1 << 20), ("2g", 2 << 30)])
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert size(text) == expected
    assert options(["--largest", text]).largest == expected


@pytest.mark.parametrize("text", ["", "0", "1.5M", "10X", "-1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size: write 64K"):
        size(text)


def test_figures_are_written_as_people_say_them() -> None:
    assert [readable_size(number) for number in (1020, 1 << 16, 1 << 20, 3 << 29)] == [
        "1020 B",
        "64 KiB",
        "1 MiB",
        "1.5 GiB",
    ]
    assert [readable_rate(rate) for rate in (1.5e6, 1.25e9)] == ["1.50 MB/s", "1.25 GB/s"]


def test_one_rank_alone_has_nothing_to_measure_and_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main([]) == 2
    assert "bench needs at least two ranks: list two nodes in NODES" in capsys.readouterr().err
