"""Each check of one node: made-up machines and facts in, findings out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from app.doctor.checks import CHECKERS, check_node
from app.doctor.facts import Facts
from app.doctor.findings import CHECKS, Finding, Level
from app.doctor.look import Disk, Look, NicHealth, look
from app.doctor.planned import PLACINGS, warnings
from app.host.accelerators.health import GpuHealth, GpuLook
from app.host.names import Answer
from app.plan import Draft, draft
from tests.machines.facts import host_of, settings_of
from tests.machines.library import MACHINES

GB = 1_000_000_000
SOUND = Disk(folder="/runs", free=500 * GB, total=1000 * GB, inodes=10**6, speed=900e6)


def facts_of(machine: str, root: Path, **changes: str) -> Facts:
    """What doctor knows on a machine of the library; `changes` to its user's settings, "" to unset."""
    settings = settings_of({**MACHINES[machine](root), **changes})
    host = host_of(settings, root)
    host = replace(host, answers={host.hostname: Answer(addresses=("10.0.0.1",)), **host.answers})
    return Facts(host=host, draft=draft(settings, host), look=replace(look(root, host, None), disk=SOUND))


def bad(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {each.check: each for each in findings if each.level in (Level.YELLOW, Level.RED)}


FINE = sorted(MACHINES.keys() - {"bond", "ib_without_subnet_manager", "ib_without_device_nodes"})


@pytest.mark.parametrize("machine", FINE)
def test_nothing_is_wrong_with_a_machine_that_is_as_it_should_be(machine: str, tmp_path: Path) -> None:
    findings = check_node(facts_of(machine, tmp_path))
    assert not bad(findings)
    assert [each.check for each in findings] == list(CHECKS[: len(CHECKERS)])


@pytest.mark.parametrize(
    ("machine", "check", "level", "words"),
    [
        ("bond", "network", Level.YELLOW, "bond0 has MTU 9000, its twin ens1f1np1 has 1500"),
        ("ib_without_subnet_manager", "rdma", Level.RED, "does opensm run?"),
        ("ib_without_device_nodes", "rdma", Level.RED, "set HARDWARE=nvidia-ib"),
    ],
)
def test_a_warning_of_the_plan_stands_at_its_check(
    machine: str, check: str, level: Level, words: str, tmp_path: Path
) -> None:
    found = bad(check_node(facts_of(machine, tmp_path)))
    assert list(found) == [check]
    assert found[check].level == level
    assert words in found[check].sentence


@pytest.mark.parametrize(
    ("machine", "changes", "check", "level"),
    [
        ("laptop", {"NODES": "10.9.9.1,10.9.9.2"}, "rank", Level.RED),
        ("laptop", {"MASTER_PORT": "http"}, "ports", Level.RED),
        ("laptop", {"MASTER_PORT": "40000"}, "ports", Level.YELLOW),
        ("laptop", {"HARDWARE": "nvidia"}, "gpus", Level.RED),
        ("laptop", {"GLOO_SOCKET_IFNAME": "ens99"}, "network", Level.RED),
        ("laptop", {"GLOO_SOCKET_IFNAME": "docker0"}, "network", Level.RED),
        ("classic_b", {"NCCL_SOCKET_IFNAME": "lo"}, "network", Level.RED),
        ("classic_a", {"GLOO_SOCKET_IFNAME": "eno1"}, "network", Level.YELLOW),
        ("classic_a", {"NCCL_IB_DISABLE": "1"}, "rdma", Level.YELLOW),
        ("classic_a", {"NCCL_IB_HCA": "mlx4"}, "rdma", Level.RED),
        ("classic_a", {"NCCL_P2P_DISABLE": "1"}, "gpus", Level.YELLOW),
        ("laptop", {"MASTR_PORT": "1"}, "settings", Level.YELLOW),
        ("laptop", {"NPROC_PER_NODE": "64"}, "limits", Level.YELLOW),
    ],
)
def test_a_wrong_setting_is_found_by_the_check_it_concerns(
    machine: str, changes: dict[str, str], check: str, level: Level, tmp_path: Path
) -> None:
    findings = check_node(facts_of(machine, tmp_path, **changes))
    found = bad(findings)
    assert (list(found), found[check].level) == ([check], level)
    assert any(text in each.sentence for each in findings for pair in changes.items() for text in pair)


def test_the_interface_of_another_network_is_named_with_both_addresses(tmp_path: Path) -> None:
    sentence = bad(check_node(facts_of("classic_a", tmp_path, GLOO_SOCKET_IFNAME="eno1")))["network"].sentence
    assert sentence.startswith("GLOO_SOCKET_IFNAME=eno1 (environment) is kept, but eno1 has 10.10.0.11, and this")
    assert (
        "address 192.168.5.228 is on ens6f1np1: the other nodes would be sent to eno1, in another network" in sentence
    )
    assert sentence.endswith("Remove it: it is derived on each node.")


def test_small_shared_memory_is_a_limit_with_the_setting_that_cures_it(tmp_path: Path) -> None:
    facts = facts_of("classic_a", tmp_path)
    host = replace(facts.host, limits=replace(facts.host.limits, shm=64 << 20))
    settings = settings_of(MACHINES["classic_a"](tmp_path / "again"))
    finding = bad(check_node(replace(facts, host=host, draft=draft(settings, host))))["limits"]
    assert "64 MiB" in finding.sentence
    assert finding.cure == "SHM_SIZE=8gb in .env"


def with_nic(facts: Facts, name: str, health: NicHealth) -> Facts:
    return replace(facts, look=replace(facts.look, nics={**facts.look.nics, name: health}))


@pytest.mark.parametrize(
    ("health", "level", "words"),
    [
        (NicHealth(duplex="half", packets=0, errors={}, flaps=1), Level.RED, "half duplex"),
        (NicHealth(duplex="full", packets=10**7, errors={"rx_crc_errors": 400}, flaps=1), Level.YELLOW, "rx_crc_err"),
        (NicHealth(duplex="full", packets=10, errors={}, flaps=40), Level.YELLOW, "went down 40 times"),
    ],
)
def test_a_sick_interface_is_named(health: NicHealth, level: Level, words: str, tmp_path: Path) -> None:
    found = bad(check_node(with_nic(facts_of("laptop", tmp_path), "enp0s31f6", health)))
    assert found["network"].level == level
    assert words in found["network"].sentence


def test_a_bond_is_judged_by_its_members_too(tmp_path: Path) -> None:
    ill = NicHealth(duplex="half", packets=0, errors={}, flaps=0)
    found = bad(check_node(with_nic(facts_of("dgx_h100", tmp_path), "ens6f1np1", ill)))
    assert found["network"].sentence.startswith("ens6f1np1 runs half duplex")


def test_a_few_errors_among_many_packets_are_no_finding(tmp_path: Path) -> None:
    health = NicHealth(duplex="full", packets=10**9, errors={"rx_missed_errors": 900}, flaps=3)
    assert not bad(check_node(with_nic(facts_of("laptop", tmp_path), "enp0s31f6", health)))


def test_rdma_error_counters_are_told_with_their_meaning(tmp_path: Path) -> None:
    facts = facts_of("dgx_h100", tmp_path)
    ill = replace(facts.look, rdma={"mlx5_4:1": {"symbol_error": 70000, "link_downed": 3, "port_xmit_data": 10**12}})
    finding = bad(check_node(replace(facts, look=ill)))["rdma"]
    assert "mlx5_4:1 counts errors" in finding.sentence
    assert "symbol_error 70000 (bit errors on the cable)" in finding.sentence
    assert "link_downed" not in finding.sentence


def test_a_host_name_without_address_is_told_and_one_on_loopback_is_not_alarmed(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path)
    none = replace(facts.host, answers={"laptop": Answer(failure="Name or service not known")})
    loopback = replace(facts.host, answers={"laptop": Answer(addresses=("127.0.1.1",))})
    nameless = bad(check_node(replace(facts, host=none)))["names"]
    assert "laptop has no address" in nameless.sentence
    assert nameless.cure == "echo '192.168.178.23 laptop' | sudo tee -a /etc/hosts"
    told = [each for each in check_node(replace(facts, host=loopback)) if each.check == "names"]
    assert told[0].level == Level.GREEN
    assert "127.0.1.1" in told[0].sentence


@pytest.mark.parametrize(
    ("address", "taken"),
    [("0.0.0.0", True), ("192.168.178.23", True), ("127.0.0.1", True), ("::", True), ("::1", False)],
)
def test_a_master_port_is_taken_when_somebody_listens_on_any_address_that_torchruns_store_needs(
    address: str, taken: bool, tmp_path: Path
) -> None:
    facts = facts_of("laptop", tmp_path)
    busy = replace(facts, look=replace(facts.look, listening=frozenset({(address, 29400)})))
    found = bad(check_node(busy))
    assert ("ports" in found) == taken
    assert not taken or "sport = :29400" in found["ports"].cure


def test_a_control_port_is_taken_where_node_0_will_listen_and_nowhere_else(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path)
    for address, taken in {"192.168.178.23": True, "0.0.0.0": True, "127.0.0.1": False}.items():
        busy = replace(facts, look=replace(facts.look, listening=frozenset({(address, 29401)})))
        assert ("ports" in bad(check_node(busy))) == taken, address


def test_a_node_alone_needs_no_control_port(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path, NODES="192.168.178.23")
    busy = replace(facts, look=replace(facts.look, listening=frozenset({("0.0.0.0", 29401)})))
    told = next(each for each in check_node(busy) if each.check == "ports")
    assert (told.level, told.sentence) == (Level.GREEN, "29400 is free")


def test_the_port_of_node_0_may_be_taken_on_other_nodes(tmp_path: Path) -> None:
    facts = facts_of("classic_b", tmp_path)
    busy = replace(facts, look=replace(facts.look, listening=frozenset({("0.0.0.0", 29400)})))
    assert not bad(check_node(busy))
    told = next(each.sentence for each in check_node(busy) if each.check == "ports")
    assert told == "only node 0 listens on 29400 and 29401"


@pytest.mark.parametrize(
    ("disk", "level", "words"),
    [
        (replace(SOUND, failure="Read-only file system"), Level.RED, "Read-only file system"),
        (replace(SOUND, free=100_000_000), Level.RED, "0.1 GB"),
        (replace(SOUND, free=5 * GB), Level.YELLOW, "5.0 GB"),
        (replace(SOUND, inodes=3), Level.RED, "3 more files"),
        (replace(SOUND, speed=2e6), Level.YELLOW, "writes 2.0 MB/s"),
        (replace(SOUND, speed=None), Level.YELLOW, "took more than 1 s"),
    ],
)
def test_a_disk_that_will_not_hold_checkpoints_is_told(disk: Disk, level: Level, words: str, tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path)
    finding = bad(check_node(replace(facts, look=replace(facts.look, disk=disk))))["disk"]
    assert finding.level == level
    assert words in finding.sentence


def test_the_state_of_gpus_is_judged(tmp_path: Path) -> None:
    facts = facts_of("classic_a", tmp_path)
    gpus = GpuLook(
        health=(
            GpuHealth(index=0, used=30000, total=40960, uncorrected=0, slowed=False),
            GpuHealth(index=1, used=400, total=40960, uncorrected=2, slowed=True),
        ),
        iommu={"0000:43:00.0": "DMA-FQ"},
        apart=((0, 1, "CNS"),),
        redirecting=("0000:40:01.0",),
        xids=(("0000:43:00", 79), ("0000:43:00", 31)),
    )
    found = check_node(replace(facts, look=replace(facts.look, gpus=gpus)))
    told = [each.sentence for each in found if each.check == "gpus"]
    expected = (
        "GPU 0: 30000 of 40960 MiB",
        "GPU 1: 2 memory errors",
        "GPU 1: the hardware holds",
        "IOMMU",
        "PCI ACS on 0000:40:01.0",
        "One pair of GPUs cannot read each other's memory, such as 0 and 1 (CNS: the chipset does not support it)",
        "Xid 79 for the GPU at 0000:43:00",
        "Xid 31",
    )
    assert len(told) == len(expected)
    for words in expected:
        assert any(words in sentence for sentence in told), words
    xids = [each for each in found if "Xid" in each.sentence]
    assert [each.level for each in xids] == [Level.RED, Level.YELLOW]
    assert "since this machine started" in xids[0].sentence
    assert "nvidia-smi -r" in xids[0].cure


@pytest.mark.parametrize(
    ("versions", "level", "words"),
    [
        ({}, Level.SKIPPED, "not visible from inside a container"),
        ({"Docker": "28.5.1", "Compose": "2.40.3"}, Level.GREEN, "Docker 28.5.1, Compose 2.40.3"),
        ({"Docker": "", "Compose": ""}, Level.SKIPPED, "does not answer here"),
        ({"Docker": "", "Compose": "2.24.0"}, Level.GREEN, "Compose 2.24.0"),
        ({"Docker": "24.0.2", "Compose": "2.21.0"}, Level.RED, "Compose 2.21.0 is too old"),
    ],
)
def test_the_engine_is_judged_where_it_can_be_seen(
    versions: dict[str, str], level: Level, words: str, tmp_path: Path
) -> None:
    facts = facts_of("laptop", tmp_path)
    found = check_node(replace(facts, look=replace(facts.look, engine=versions)))
    engine = next(each for each in found if each.check == "engine")
    assert engine.level == level
    assert words in engine.sentence


def test_the_limits_that_were_looked_at_are_told(tmp_path: Path) -> None:
    told = next(each for each in check_node(facts_of("laptop", tmp_path)) if each.check == "limits")
    assert told.sentence.startswith("8 CPUs, memory ")
    assert "shared memory" in told.sentence


def test_a_slow_clock_source_is_told(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path)
    assert "hpet" in bad(check_node(replace(facts, look=replace(facts.look, clock_source="hpet"))))["clock"].sentence


def test_what_was_not_checked_is_never_green(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path, NODES="10.9.9.1,10.9.9.2")
    levels = {each.check: each.level for each in check_node(replace(facts, look=Look()))}
    for check in ("network", "ports", "rdma", "gpus", "disk", "clock"):
        assert levels[check] == Level.SKIPPED, check


@pytest.mark.parametrize(
    ("warning", "check", "level"),
    [
        ("eth0 carries 10.0.0.1, but its link is down: check its cable and switch.", "network", Level.RED),
        (
            "eth0 and eth1 are both in 10.0.0.0/24, and each answers for the other's address, so",
            "network",
            Level.YELLOW,
        ),
    ],
)
def test_a_warning_about_the_interface_stands_at_the_network(warning: str, check: str, level: Level) -> None:
    (finding,) = warnings(Draft(plan=None, problems=(), decisions=(), warnings=(warning,)))
    assert (finding.check, finding.level) == (check, level)


def test_every_placing_names_a_check_of_the_table() -> None:
    assert {each.check for each in PLACINGS} <= set(CHECKS)
