"""Agreement and reach: what nodes compare, how a difference is shown, whom each node dials."""

from pathlib import Path

import pytest

from app.gang.agreement import differences, module_digest
from app.gang.connectivity import ALL_PAIRS, targets
from app.gang.probes import allow

BASE = {"torch": "2.13.0", "NPROC_PER_NODE": "2", "mtu": "1500", "python": "3.12"}


def test_equal_facts_make_no_table() -> None:
    assert differences({0: BASE, 1: dict(BASE)}) == ("", "")


def test_a_torch_that_differs_is_refused_with_the_nodes_and_the_cure() -> None:
    wrong, doubtful = differences({0: BASE, 1: BASE, 2: {**BASE, "torch": "2.12.1"}})
    assert wrong == "  torch  2.13.0 (nodes 0, 1)   2.12.1 (node 2)\n  Use the same image on all nodes."
    assert doubtful == ""


@pytest.mark.parametrize(
    "name", ["mtu", "python", "gpus", "hcas", "link layer", "cuda driver", "NCCL_ALGO", "STOP_GRACE"]
)
def test_what_may_differ_for_a_good_reason_is_a_warning(name: str) -> None:
    wrong, doubtful = differences({0: {**BASE, name: "a"}, 1: BASE})
    assert wrong == ""
    assert doubtful.startswith(f"  {name}  a (node 0)   ")


def test_packages_that_differ_are_named_one_by_one_with_the_cure_and_refuse_nothing() -> None:
    first = {**BASE, "packages": "numpy-2.1.0 pillow-12.0"}
    wrong, doubtful = differences({0: first, 1: first, 2: {**BASE, "packages": "einops-0.8 numpy-2.2.0 pillow-12.0"}})
    assert wrong == ""
    assert doubtful.splitlines()[:2] == [
        "  package einops  - (nodes 0, 1)   0.8 (node 2)",
        "  package numpy   2.1.0 (nodes 0, 1)   2.2.0 (node 2)",
    ]
    assert doubtful.endswith("docker load`.")


def test_images_that_have_little_in_common_make_no_endless_table() -> None:
    many = " ".join(f"package{number}-1.0" for number in range(300))
    _, doubtful = differences({0: {**BASE, "packages": many}, 1: BASE})
    assert "  and 288 more" in doubtful
    assert len(doubtful.splitlines()) == 14


def test_a_fact_that_one_node_lacks_is_shown_as_a_dash() -> None:
    wrong, _ = differences({0: BASE, 1: {**BASE, "content of train.py": "3fa2"}})
    assert wrong.startswith("  content of train.py  - (node 0)   3fa2 (node 1)")


def test_the_digest_of_a_package_changes_with_any_of_its_files(tmp_path: Path) -> None:
    package = tmp_path / "mine" / "train"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text("import mine.train.model")
    (package / "model.py").write_text("layers = 2")
    first = module_digest(("-m", "mine.train"), [str(tmp_path)])
    (package / "model.py").write_text("layers = 3")
    assert first
    assert module_digest(("-m", "mine.train"), [str(tmp_path)]) != first
    assert module_digest(("-m", "mine.absent"), [str(tmp_path)]) == ""


def test_the_rule_that_lets_a_node_in_is_of_its_addresses_kind() -> None:
    assert allow("10.0.0.1", "10.0.0.2") == "sudo iptables -I INPUT -p tcp -s 10.0.0.1 -d 10.0.0.2 -j ACCEPT"
    assert allow("2001:db8::1") == "sudo ip6tables -I INPUT -p tcp -s 2001:db8::1 -j ACCEPT"


def test_small_clusters_try_every_pair_both_ways() -> None:
    dialled = {(index, other) for index in range(ALL_PAIRS) for other in targets(index, ALL_PAIRS)}
    assert len(dialled) == ALL_PAIRS * (ALL_PAIRS - 1)


@pytest.mark.parametrize("count", [17, 64, 1000])
def test_large_clusters_dial_few_and_every_node_is_dialled_by_several(count: int) -> None:
    dialled = [targets(index, count) for index in range(count)]
    assert max(map(len, dialled)) <= count.bit_length() + 2
    callers = [sum(index in chosen for chosen in dialled) for index in range(count)]
    assert min(callers) >= count.bit_length() - 1
    assert all(0 in chosen for chosen in dialled[1:])


def test_a_thousand_nodes_that_all_differ_are_a_table_that_fits_a_line_of_the_wire() -> None:
    wrong, _ = differences({rank: {"torch": f"{rank:080d}", "NODES": f"{rank:080d}"} for rank in range(1000)})
    assert len(wrong) < 4000
    assert "and 992 other values" in wrong
