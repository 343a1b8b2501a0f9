"""Each check of one node: made-up machines and facts in, findings out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from app.config.problems import CHECKS as ABOUT
from app.config.problems import problem
from app.doctor.collect.live import CheckpointDisk, LiveFacts, NicHealth, collect
from app.doctor.facts import Facts
from app.doctor.findings import CHECKS, Finding, Severity
from app.doctor.node_checks import CHECKERS, check_node
from app.doctor.planned import ELSEWHERE, planned
from app.host.accelerators.gpu import GpuFault, GpuHealth, GpuState
from app.host.names import Answer
from app.plan import Draft, draft
from tests.machines.facts import host_of, settings_of
from tests.machines.library import MACHINES

GB = 1_000_000_000
SOUND = CheckpointDisk(folder="/runs", free=500 * GB, total=1000 * GB, inodes=10**6, speed=900e6)


def facts_of(machine: str, root: Path, **changes: str) -> Facts:
    """What doctor knows on a machine of the library; `changes` to its user's settings, "" to unset."""
    settings = settings_of({**MACHINES[machine](root), **changes})
    host = host_of(settings, root)
    host = replace(host, answers={host.hostname: Answer(addresses=("10.0.0.1",)), **host.answers})
    return Facts(host=host, draft=draft(settings, host), live=replace(collect(root, host, None), disk=SOUND))


def bad(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {each.check: each for each in findings if each.bad}


FINE = sorted(MACHINES.keys() - {"bond", "ib_without_subnet_manager", "ib_without_device_nodes", "aws_p5"})


@pytest.mark.parametrize("machine", FINE)
def test_nothing_is_wrong_with_a_machine_that_is_as_it_should_be(machine: str, tmp_path: Path) -> None:
    findings = check_node(facts_of(machine, tmp_path))
    assert not bad(findings)
    assert [each.check for each in findings] == list(CHECKS[: len(CHECKERS)])


@pytest.mark.parametrize(
    ("machine", "check", "severity", "id_"),
    [
        ("bond", "network", Severity.YELLOW, "network.twin-mtu"),
        ("ib_without_subnet_manager", "rdma", Severity.RED, "rdma.no-usable-port"),
        ("ib_without_device_nodes", "rdma", Severity.RED, "rdma.no-device-nodes"),
    ],
)
def test_a_warning_of_the_plan_stands_at_its_check(
    machine: str, check: str, severity: Severity, id_: str, tmp_path: Path
) -> None:
    found = bad(check_node(facts_of(machine, tmp_path)))
    assert list(found) == [check]
    assert (found[check].id, found[check].severity) == (id_, severity)


@pytest.mark.parametrize(
    ("machine", "changes", "check", "severity"),
    [
        ("laptop", {"NODES": "10.9.9.1,10.9.9.2"}, "rank", Severity.RED),
        ("laptop", {"MASTER_PORT": "http"}, "ports", Severity.RED),
        ("laptop", {"MASTER_PORT": "40000"}, "ports", Severity.YELLOW),
        ("laptop", {"HARDWARE": "nvidia"}, "gpus", Severity.RED),
        ("laptop", {"GLOO_SOCKET_IFNAME": "ens99"}, "network", Severity.RED),
        ("laptop", {"GLOO_SOCKET_IFNAME": "docker0"}, "network", Severity.RED),
        ("classic_b", {"NCCL_SOCKET_IFNAME": "lo"}, "network", Severity.RED),
        ("classic_a", {"GLOO_SOCKET_IFNAME": "eno1"}, "network", Severity.YELLOW),
        ("classic_a", {"NCCL_IB_DISABLE": "1"}, "rdma", Severity.YELLOW),
        ("classic_a", {"NCCL_IB_HCA": "mlx4"}, "rdma", Severity.RED),
        ("classic_a", {"NCCL_P2P_DISABLE": "1"}, "gpus", Severity.YELLOW),
        ("laptop", {"MASTR_PORT": "1"}, "settings", Severity.YELLOW),
        ("laptop", {"NPROC_PER_NODE": "64"}, "limits", Severity.YELLOW),
    ],
)
def test_a_wrong_setting_is_found_by_the_check_it_concerns(
    machine: str, changes: dict[str, str], check: str, severity: Severity, tmp_path: Path
) -> None:
    findings = check_node(facts_of(machine, tmp_path, **changes))
    found = bad(findings)
    assert (list(found), found[check].severity) == ([check], severity)
    assert any(text in each.sentence for each in findings for pair in changes.items() for text in pair)


def test_the_interface_of_another_network_is_named_with_both_addresses(tmp_path: Path) -> None:
    finding = bad(check_node(facts_of("classic_a", tmp_path, GLOO_SOCKET_IFNAME="eno1")))["network"]
    sentence = finding.sentence
    assert sentence.startswith("GLOO_SOCKET_IFNAME=eno1 (environment) is kept, but eno1 has 10.10.0.11, and this")
    assert (
        "address 192.168.5.228 is on ens6f1np1: the other nodes would be sent to eno1, in another network" in sentence
    )
    assert finding.fix == "Remove it: it is derived on each node"


def test_small_shared_memory_is_a_limit_with_the_setting_that_fixes_it(tmp_path: Path) -> None:
    facts = facts_of("classic_a", tmp_path)
    host = replace(facts.host, limits=replace(facts.host.limits, shm=64 << 20))
    settings = settings_of(MACHINES["classic_a"](tmp_path / "again"))
    finding = bad(check_node(replace(facts, host=host, draft=draft(settings, host))))["limits"]
    assert "64 MiB" in finding.sentence
    assert finding.fix.startswith("Set SHM_SIZE in .env")


def with_nic(facts: Facts, name: str, health: NicHealth) -> Facts:
    return replace(facts, live=replace(facts.live, nics={**facts.live.nics, name: health}))


@pytest.mark.parametrize(
    ("health", "severity", "id_"),
    [
        (NicHealth(duplex="half", packets=0, errors={}, flaps=1), Severity.RED, "nic-half-duplex"),
        (
            NicHealth(duplex="full", packets=10**7, errors={"rx_crc_errors": 400}, flaps=1),
            Severity.YELLOW,
            "nic-errors",
        ),
        (NicHealth(duplex="full", packets=10, errors={}, flaps=40), Severity.YELLOW, "nic-flaps"),
    ],
)
def test_a_sick_interface_is_named(health: NicHealth, severity: Severity, id_: str, tmp_path: Path) -> None:
    found = bad(check_node(with_nic(facts_of("laptop", tmp_path), "enp0s31f6", health)))["network"]
    assert (found.id, found.severity, found.values["nic"]) == (id_, severity, "enp0s31f6")


def test_a_bond_is_judged_by_its_members_too(tmp_path: Path) -> None:
    ill = NicHealth(duplex="half", packets=0, errors={}, flaps=0)
    found = bad(check_node(with_nic(facts_of("dgx_h100", tmp_path), "ens6f1np1", ill)))
    assert (found["network"].id, found["network"].values["nic"]) == ("nic-half-duplex", "ens6f1np1")


def test_a_few_errors_among_many_packets_are_no_finding(tmp_path: Path) -> None:
    health = NicHealth(duplex="full", packets=10**9, errors={"rx_missed_errors": 900}, flaps=3)
    assert not bad(check_node(with_nic(facts_of("laptop", tmp_path), "enp0s31f6", health)))


def test_rdma_error_counters_are_told_with_their_meaning(tmp_path: Path) -> None:
    facts = facts_of("dgx_h100", tmp_path)
    ill = replace(facts.live, rdma={"mlx5_4:1": {"symbol_error": 70000, "link_downed": 3, "port_xmit_data": 10**12}})
    finding = bad(check_node(replace(facts, live=ill)))["rdma"]
    assert finding.id == "rdma-errors"
    assert finding.values == {
        "port": "mlx5_4:1",
        "counters": "symbol_error 70000 (bit errors on the cable)",
        "place": "mlx5_4/ports/1",
    }


def test_a_host_name_without_address_is_told_and_one_on_loopback_is_not_alarmed(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path)
    none = replace(facts.host, answers={"laptop": Answer(failure="Name or service not known")})
    loopback = replace(facts.host, answers={"laptop": Answer(addresses=("127.0.1.1",))})
    nameless = bad(check_node(replace(facts, host=none)))["names"]
    assert (nameless.id, nameless.values["name"]) == ("name-without-address", "laptop")
    assert nameless.fix == "echo '192.168.178.23 laptop' | sudo tee -a /etc/hosts"
    told = [each for each in check_node(replace(facts, host=loopback)) if each.check == "names"]
    assert (told[0].severity, told[0].values["addresses"]) == (Severity.GREEN, "127.0.1.1")


@pytest.mark.parametrize(
    ("address", "taken"),
    [("0.0.0.0", True), ("192.168.178.23", True), ("127.0.0.1", True), ("::", True), ("::1", False)],
)
def test_a_master_port_is_taken_when_somebody_listens_on_any_address_that_torchruns_store_needs(
    address: str, taken: bool, tmp_path: Path
) -> None:
    facts = facts_of("laptop", tmp_path)
    busy = replace(facts, live=replace(facts.live, listening=frozenset({(address, 29400)})))
    found = bad(check_node(busy))
    assert ("ports" in found) == taken
    assert not taken or "sport = :29400" in found["ports"].fix


def test_a_control_port_is_taken_where_node_0_will_listen_and_nowhere_else(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path)
    for address, taken in {"192.168.178.23": True, "0.0.0.0": True, "127.0.0.1": False}.items():
        busy = replace(facts, live=replace(facts.live, listening=frozenset({(address, 29401)})))
        assert ("ports" in bad(check_node(busy))) == taken, address


def test_a_node_alone_needs_no_control_port(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path, NODES="192.168.178.23")
    busy = replace(facts, live=replace(facts.live, listening=frozenset({("0.0.0.0", 29401)})))
    told = next(each for each in check_node(busy) if each.check == "ports")
    assert (told.severity, told.sentence) == (Severity.GREEN, "29400 is free")


def test_the_port_of_node_0_may_be_taken_on_other_nodes(tmp_path: Path) -> None:
    facts = facts_of("classic_b", tmp_path)
    busy = replace(facts, live=replace(facts.live, listening=frozenset({("0.0.0.0", 29400)})))
    assert not bad(check_node(busy))
    told = next(each.sentence for each in check_node(busy) if each.check == "ports")
    assert told == "only node 0 listens on 29400 and 29401"


@pytest.mark.parametrize(
    ("disk", "severity", "id_"),
    [
        (replace(SOUND, failure="Read-only file system"), Severity.RED, "disk-not-writable"),
        (replace(SOUND, free=100_000_000), Severity.RED, "disk-full"),
        (replace(SOUND, free=5 * GB), Severity.YELLOW, "disk-full"),
        (replace(SOUND, inodes=3), Severity.RED, "disk-inodes"),
        (replace(SOUND, speed=2e6), Severity.YELLOW, "disk-slow"),
        (replace(SOUND, speed=None), Severity.YELLOW, "disk-slow"),
    ],
)
def test_a_disk_that_will_not_hold_checkpoints_is_told(
    disk: CheckpointDisk, severity: Severity, id_: str, tmp_path: Path
) -> None:
    facts = facts_of("laptop", tmp_path)
    finding = bad(check_node(replace(facts, live=replace(facts.live, disk=disk))))["disk"]
    assert (finding.id, finding.severity, finding.values["folder"]) == (id_, severity, "/runs")
    assert "/runs" in finding.sentence


def test_the_state_of_gpus_is_judged(tmp_path: Path) -> None:
    facts = facts_of("classic_a", tmp_path)
    gpus = GpuState(
        health=(
            GpuHealth(index=0, used=30000, total=40960, uncorrected=0, slowed=False),
            GpuHealth(index=1, used=400, total=40960, uncorrected=2, slowed=True),
        ),
        iommu={"0000:43:00.0": "DMA-FQ"},
        apart=((0, 1, "the chipset does not support it"),),
        redirecting=("0000:40:01.0",),
        faults=(
            GpuFault(bus="0000:43:00", name="Xid 79", dead=True),
            GpuFault(bus="0000:43:00", name="Xid 31", dead=False),
        ),
    )
    found = check_node(replace(facts, live=replace(facts.live, gpus=gpus)))
    told = [(each.id, each.severity) for each in found if each.check == "gpus"]
    assert told == [
        ("gpu-memory-used", Severity.YELLOW),
        ("gpu-ecc", Severity.RED),
        ("gpu-slowed", Severity.YELLOW),
        ("gpu-iommu", Severity.YELLOW),
        ("gpu-acs", Severity.YELLOW),
        ("gpu-no-p2p", Severity.YELLOW),
        ("gpu-dead", Severity.RED),
        ("gpu-fault", Severity.YELLOW),
    ]
    by_id = {each.id: each for each in found}
    assert by_id["gpu-memory-used"].values == {"gpu": 0, "used": 30000, "total": 40960}
    assert by_id["gpu-ecc"].sentence == "GPU 1: 2 memory errors (ECC) that could not be corrected."
    assert (
        "1 pair of GPUs cannot read each other's memory, such as 0 and 1 (the chipset " in by_id["gpu-no-p2p"].sentence
    )
    assert (by_id["gpu-dead"].values["fault"], by_id["gpu-fault"].values["fault"]) == ("Xid 79", "Xid 31")
    assert "nvidia-smi -r" in by_id["gpu-dead"].fix


@pytest.mark.parametrize(
    ("versions", "severity", "words"),
    [
        ({}, Severity.SKIPPED, "not visible from inside a container"),
        ({"Docker": "28.5.1", "Compose": "2.40.3"}, Severity.GREEN, "Docker 28.5.1, Compose 2.40.3"),
        ({"Docker": "", "Compose": ""}, Severity.SKIPPED, "does not answer here"),
        ({"Docker": "", "Compose": "2.24.0"}, Severity.GREEN, "Compose 2.24.0"),
        ({"Docker": "24.0.2", "Compose": "2.21.0"}, Severity.RED, "Compose 2.21.0 is too old"),
    ],
)
def test_the_engine_is_judged_where_it_can_be_seen(
    versions: dict[str, str], severity: Severity, words: str, tmp_path: Path
) -> None:
    facts = facts_of("laptop", tmp_path)
    found = check_node(replace(facts, live=replace(facts.live, engine=versions)))
    engine = next(each for each in found if each.check == "engine")
    assert engine.severity == severity
    assert words in engine.sentence


def test_the_limits_that_were_looked_at_are_told(tmp_path: Path) -> None:
    told = next(each for each in check_node(facts_of("laptop", tmp_path)) if each.check == "limits")
    assert told.sentence.startswith("8 CPUs, memory ")
    assert "shared memory" in told.sentence


def test_a_slow_clock_source_is_told(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path)
    assert "hpet" in bad(check_node(replace(facts, live=replace(facts.live, clock_source="hpet"))))["clock"].sentence


def test_what_was_not_checked_is_never_green(tmp_path: Path) -> None:
    facts = facts_of("laptop", tmp_path, NODES="10.9.9.1,10.9.9.2")
    levels = {each.check: each.severity for each in check_node(replace(facts, live=LiveFacts()))}
    for check in ("network", "ports", "rdma", "gpus", "disk", "clock"):
        assert levels[check] == Severity.SKIPPED, check


def test_a_problem_of_the_plan_stands_at_its_check_with_its_id_values_and_fix() -> None:
    down = problem("network.link-down", "severe", nic="eth0", address="10.0.0.1", state="down")
    slow = problem("script.spawns", "warning", file="x.py", line="1")
    found = planned(Draft(plan=None, run_dir=Path("r"), problems=(), decisions=(), warnings=(down, slow)))
    assert [(each.id, each.check, each.severity) for each in found] == [
        ("network.link-down", "network", Severity.RED),
        ("script.spawns", "settings", Severity.YELLOW),
    ]
    assert (found[0].sentence, found[0].fix) == (f"{down.cause}.", down.remedy)
    assert found[0].values == {"nic": "eth0", "address": "10.0.0.1", "state": "down"}


def test_doctor_has_a_check_for_all_that_a_problem_may_be_about() -> None:
    assert {ELSEWHERE.get(each, each) for each in ABOUT} <= set(CHECKS)
