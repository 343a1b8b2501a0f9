"""Which node this is: by address, by hand, by the classic variables, by a scheduler; and every way to get it wrong."""

from dataclasses import replace
from ipaddress import ip_network

import pytest

from app.host.names import Answer
from app.host.nics import Route
from app.plan.schedulers import expand_nodelist
from tests.unit.launch_facts import DOCKER, LOOPBACK, card, decide, machine, planned, reason, refused, warned

FABRIC = card("ens1", "10.0.0.2/24")
MANAGEMENT = card("eno1", "192.168.1.2/24")
HOST = machine(MANAGEMENT, FABRIC, DOCKER)
NODES = "10.0.0.1,10.0.0.2"


def test_the_rank_is_the_place_of_this_machines_address_in_nodes() -> None:
    plan = planned(HOST, NODES="10.0.0.1,10.0.0.2,10.0.0.3")
    assert (plan.nodes.rank, plan.network.address, plan.network.interface) == (1, "10.0.0.2", "ens1")
    assert plan.nodes.addresses == plan.nodes.names == ("10.0.0.1", "10.0.0.2", "10.0.0.3")
    assert (plan.network.master_addr, plan.world_size) == ("10.0.0.1", 3 * plan.workers.nproc)


@pytest.mark.parametrize("text", ["10.0.0.1, 10.0.0.2", "10.0.0.1\n10.0.0.2 # two", " 10.0.0.1;10.0.0.2 ,"])
def test_spaces_line_ends_and_comments_in_nodes_are_fine(text: str) -> None:
    assert planned(HOST, NODES=text).nodes.addresses == ("10.0.0.1", "10.0.0.2")


def test_the_listed_address_decides_between_two_networks() -> None:
    assert planned(HOST, NODES="192.168.1.1,192.168.1.2").network.interface == "eno1"
    assert planned(HOST, NODES=NODES).network.interface == "ens1"


def test_no_match_lists_nodes_and_addresses_side_by_side() -> None:
    assert refused(HOST, NODES="10.9.0.1,10.9.0.2") == (
        "NODES=10.9.0.1,10.9.0.2 (environment): none of these is an address of this machine, so its rank is unknown. "
        "Correct NODES, or set NODE_RANK (0 to 1) on this node if it is behind address translation.\n"
        "    NODES         this machine\n"
        "    0 10.9.0.1    eno1 192.168.1.2\n"
        "    1 10.9.0.2    ens1 10.0.0.2\n"
        "                  docker0 172.17.0.1 (container network, the same on every machine)"
    )


@pytest.mark.parametrize(
    ("inside", "word"), [("wsl", "mirrored"), ("desktop", "virtual machine"), ("rootless", "root")]
)
def test_a_network_that_is_not_the_machines_is_told_in_place_of_a_firewall(inside: str, word: str) -> None:
    host = replace(HOST, inside=inside)
    told = refused(host, NODES="10.9.0.1,10.9.0.2")
    assert word in told
    assert "so its rank is unknown" not in told
    assert planned(host, NODES=NODES).nodes.rank == 1, "mirrored, or whatever gives it the address"


def test_two_matches_are_refused_until_node_rank_says_which() -> None:
    assert "2 of these are addresses of this machine" in refused(HOST, NODES="192.168.1.2,10.0.0.2")
    assert planned(HOST, NODES="192.168.1.2,10.0.0.2", NODE_RANK="1").network.address == "10.0.0.2"


def test_addresses_of_container_networks_never_match() -> None:
    assert "none of these" in refused(HOST, NODES="172.17.0.1,10.9.0.2")


def test_an_ipv6_address_matches_in_any_spelling() -> None:
    host = machine(card("ens1", "2001:db8::2/64"))
    assert planned(host, NODES="[2001:DB8:0::1],2001:0db8::0002").nodes.addresses == ("2001:db8::1", "2001:db8::2")


def test_ipv6_nodes_on_an_interface_with_both_families_keep_nccl_to_ipv6() -> None:
    host = machine(card("ens1", "10.0.0.2/24", "2001:db8::2/64"))
    plan = planned(host, NODES="2001:db8::1,2001:db8::2")
    assert plan.script.env["NCCL_SOCKET_FAMILY"] == "AF_INET6"
    (warning,) = plan.warnings
    assert "uses 2001:db8::2, but Gloo uses the first, 10.0.0.2" in warning.message


def test_mixed_families_are_refused() -> None:
    assert "mixes IPv4 and IPv6" in refused(HOST, NODES="10.0.0.2,2001:db8::1")


def test_a_second_address_of_the_interface_is_warned_about() -> None:
    host = machine(card("ens1", "10.0.0.9/24", "10.0.0.2/24"))
    assert "use the first, 10.0.0.9" in warned(host, NODES=NODES)
    assert warned(host, NODES="10.0.0.1,10.0.0.9") == ""


def named(**answers: tuple[str, ...]) -> dict[str, Answer]:
    return {name: Answer(addresses=found, failure="" if found else "Name not known") for name, found in answers.items()}


def test_names_are_resolved_and_kept_as_written() -> None:
    host = machine(FABRIC, answers=named(a=("10.0.0.1",), b=("2001:db8::7", "10.0.0.2")))
    plan = planned(host, NODES="a,b")
    assert (plan.nodes.rank, plan.nodes.addresses, plan.nodes.names) == (1, ("10.0.0.1", "10.0.0.2"), ("a", "b"))
    assert ("NODES", "a,b") in plan.equal


def test_an_unresolvable_name_is_refused_with_what_the_resolver_said() -> None:
    message = refused(machine(FABRIC, answers=named(a=())), NODES="10.0.0.2,a")
    assert message == (
        "NODES=10.0.0.2,a (environment): a has no address here (Name not known). Write its address, or add it to DNS "
        "or /etc/hosts."
    )


def test_two_names_of_one_machine_are_refused() -> None:
    host = machine(FABRIC, answers=named(a=("10.0.0.1",), b=("10.0.0.1",)))
    assert "node 0 (a) and node 2 (b) are one machine" in refused(host, NODES="a,10.0.0.2,b")


def test_an_ipoib_interface_is_found_like_any_other() -> None:
    plan = planned(machine(MANAGEMENT, card("ib0", "10.5.0.2/24", kind="infiniband")), NODES="10.5.0.1,10.5.0.2")
    assert plan.script.env["NCCL_SOCKET_IFNAME"] == "=ib0"
    assert plan.script.env["GLOO_SOCKET_IFNAME"] == "ib0"


def test_the_own_name_that_means_127_0_1_1_gets_the_address_towards_the_others() -> None:
    host = machine(MANAGEMENT, FABRIC, answers=named(a=("10.0.0.1",), me=("127.0.1.1",)))
    found = decide(host, NODES="a,me")
    assert found.plan is not None
    assert (found.plan.nodes.rank, found.plan.network.address) == (1, "10.0.0.2")
    (warning,) = found.warnings
    assert warning.id == "names.own-name-is-loopback"
    assert warning.values == {"entry": "me", "loopback": "127.0.1.1", "address": "10.0.0.2"}


def test_a_loopback_address_among_others_is_refused() -> None:
    assert "which the other nodes cannot reach" in refused(HOST, NODES="127.0.0.1,10.0.0.9")


@pytest.mark.parametrize(
    ("nodes", "wrong"),
    [
        ("10.0.0.1,10.0.0.2,10.0.0.1", "node 0 (10.0.0.1) and node 2 (10.0.0.1) are one machine"),
        ("10.0.0.1,10.0.0", "10.0.0 is not a complete IPv4 address"),
        ("10.0.0.1:29400,10.0.0.2", "10.0.0.1:29400 has a port"),
        ("fe80::1,10.0.0.2", "fe80::1 is a link-local address"),
        ("[fd00::2]:29400,10.0.0.2", "[fd00::2]:29400 has a port"),
        ("10.0.0.1,10.0.0.02", "10.0.0.02 has a leading zero, which may mean octal. Write it without"),
        ("0.0.0.0,10.0.0.2", "0.0.0.0 names no machine. Write the node's own address"),
        ("10.0.0.2,224.0.0.1", "224.0.0.1 names no machine"),
        ("10.0.0.2,255.255.255.255", "255.255.255.255 names no machine"),
        ("::,fd00::2", ":: names no machine"),
        ("ff02::1,fd00::2", "ff02::1 names no machine"),
        ("a/b,10.0.0.2", "a/b is neither an address nor a host name"),
        (",", "names no node"),
    ],
)
def test_an_entry_that_cannot_be_a_node_is_refused(nodes: str, wrong: str) -> None:
    assert wrong in refused(HOST, NODES=nodes)


def test_node_rank_by_hand_wins_and_is_checked_against_the_address() -> None:
    assert reason(decide(HOST, NODES=NODES, NODE_RANK="1"), "NODE_RANK").startswith("as you set it; 10.0.0.2 is an")
    assert refused(HOST, NODES=NODES, NODE_RANK="0") == (
        "NODE_RANK=0 (environment) is 10.0.0.1 by NODES, but this machine has 10.0.0.2 (node 1). Remove NODE_RANK to "
        "have it found by address, or correct NODES."
    )


def test_node_rank_without_any_match_is_kept_with_a_warning_and_the_routed_address() -> None:
    route = Route(interface="ens1", network=ip_network("10.9.0.0/16"), metric=0)
    host = machine(MANAGEMENT, FABRIC, routes=(route,))
    plan = planned(host, NODES="10.9.0.1,10.9.0.2", NODE_RANK="1")
    assert (plan.nodes.rank, plan.network.address, plan.nodes.addresses) == (1, "10.0.0.2", ("10.9.0.1", "10.9.0.2"))
    assert [each.id for each in plan.warnings] == ["rank.unchecked"]


def test_node_rank_beyond_nodes_is_refused() -> None:
    assert "ranks run from 0 to 1" in refused(HOST, NODES=NODES, NODE_RANK="2")


def test_nnodes_beside_nodes_must_agree() -> None:
    assert "Remove NNODES" in refused(HOST, NODES=NODES, NNODES="3")
    assert planned(HOST, NODES=NODES, NNODES="2").nodes.count == 2


def test_master_addr_must_be_node_0() -> None:
    assert "is not node 0, which is 10.0.0.1" in refused(HOST, NODES=NODES, MASTER_ADDR="10.0.0.2")
    assert "is not node 0, which is 10.0.0.1" in refused(HOST, NODES=NODES, MASTER_ADDR="localhost")
    assert planned(HOST, NODES=NODES, MASTER_ADDR="10.0.0.1").network.master_addr == "10.0.0.1"
    host = machine(FABRIC, answers=named(head=("10.0.0.1",)))
    assert planned(host, NODES=NODES, MASTER_ADDR="head").network.master_addr == "10.0.0.1"


@pytest.mark.parametrize("others", [{"NODES": NODES}, {"NNODES": "2", "NODE_RANK": "1"}, {}])
@pytest.mark.parametrize(
    ("master", "wrong"),
    [
        ("10.0.0.1:29500", "has a port. Write the address alone: the port is MASTER_PORT."),
        ("0.0.0.0", "names no machine. Write the node's own address."),
        ("10.0.0.01", "has a leading zero, which may mean octal. Write it without."),
    ],
)
def test_master_addr_is_read_like_an_entry_of_nodes(master: str, wrong: str, others: dict[str, str]) -> None:
    assert refused(HOST, MASTER_ADDR=master, **others) == f"MASTER_ADDR={master} (environment): {master} {wrong}"


def test_one_listed_node_is_one_node() -> None:
    assert reason(decide(HOST, NODES="10.0.0.2"), "NODES") == "1 node in rank order"
    assert "but NODES lists 1 node:" in refused(HOST, NODES="10.0.0.2", NODE_RANK="1")


def test_the_table_for_loopback_nodes_shows_why_each_of_them_is_here() -> None:
    assert "    0 127.0.0.1    lo 127.0.0.0/8\n" in refused(HOST, NODES="127.0.0.1,127.0.0.2")


def test_several_nodes_on_one_machine_use_loopback_addresses_and_node_rank() -> None:
    plan = planned(HOST, NODES="127.0.0.1,127.0.0.2", NODE_RANK="1")
    assert (plan.network.address, plan.network.interface, plan.warnings) == ("127.0.0.2", "lo", ())
    assert "set NODE_RANK (0 or 1)" in refused(HOST, NODES="127.0.0.1,127.0.0.2")


def test_nothing_set_is_one_node_that_uses_no_network() -> None:
    plan = planned(HOST)
    assert (plan.nodes.rank, plan.nodes.addresses, plan.network.address, plan.network.interface) == (
        0,
        ("127.0.0.1",),
        "127.0.0.1",
        "lo",
    )
    assert planned(HOST, NNODES="1", NODE_RANK="0").nodes.addresses == ("127.0.0.1",)


@pytest.mark.parametrize("master", ["localhost", "127.0.0.1", "10.0.0.2"])
def test_a_left_over_master_addr_of_this_machine_is_still_one_node(master: str) -> None:
    host = machine(FABRIC, answers=named(localhost=("127.0.0.1",)))
    assert planned(host, MASTER_ADDR=master).nodes.addresses == ("127.0.0.1",)


def test_one_listed_node_uses_its_own_interface() -> None:
    assert planned(HOST, NODES="10.0.0.2").network.interface == "ens1"


def test_the_classic_variables_place_the_known_nodes_and_leave_the_others_to_the_roll_call() -> None:
    plan = planned(HOST, NNODES="3", NODE_RANK="2", MASTER_ADDR="10.0.0.1")
    assert (plan.nodes.rank, plan.nodes.addresses, plan.network.address) == (
        2,
        ("10.0.0.1", "", "10.0.0.2"),
        "10.0.0.2",
    )
    assert "NODES" not in dict(plan.equal)


def test_the_classic_variables_on_node_0() -> None:
    plan = planned(HOST, NNODES="2", NODE_RANK="0", MASTER_ADDR="10.0.0.2")
    assert (plan.nodes.addresses, plan.network.interface) == (("10.0.0.2", ""), "ens1")
    assert "although it is node 0" in warned(HOST, NNODES="2", NODE_RANK="0", MASTER_ADDR="10.0.0.1")


def test_classic_nodes_on_one_machine_get_an_address_each() -> None:
    assert planned(HOST, NNODES="2", NODE_RANK="1", MASTER_ADDR="127.0.0.1").nodes.addresses == (
        "127.0.0.1",
        "127.0.0.2",
    )


@pytest.mark.parametrize(
    ("environ", "wrong"),
    [
        ({"NNODES": "2"}, "NODE_RANK and MASTER_ADDR are not set"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "10.0.0.1"}, "but NNODES and NODE_RANK are not set"),
        ({"NODE_RANK": "1"}, "NNODES and MASTER_ADDR are not set"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1"}, "ranks run from 0 to 1"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.2"},
            "is an address of this machine, so it is node 0",
        ),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a b"}, "is neither an address nor a host name"),
    ],
)
def test_an_incomplete_or_contradictory_classic_set_is_refused(environ: dict[str, str], wrong: str) -> None:
    assert wrong in refused(HOST, **environ)


SLURM = {"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
RESOLVED = machine(FABRIC, answers=named(n1=("10.0.0.1",), n2=("10.0.0.2",)))


def test_slurm_gives_rank_size_and_master_where_nothing_more_explicit_is_set() -> None:
    found = decide(RESOLVED, **SLURM)
    assert found.plan is not None
    assert (found.plan.nodes.rank, found.plan.network.master_addr, found.plan.nodes.count) == (1, "10.0.0.1", 2)
    assert reason(found, "NODE_RANK") == "from Slurm, since neither NODES nor NODE_RANK is set"
    explicit = decide(RESOLVED, **SLURM, NODES="10.0.0.2,10.0.0.1")
    assert explicit.plan is not None
    assert explicit.plan.nodes.rank == 0


def test_a_rank_of_slurm_that_contradicts_master_addr_names_slurm() -> None:
    environ = {**SLURM, "MASTER_ADDR": "10.0.0.2"}
    assert "NODE_RANK=1 (SLURM_NODEID), but MASTER_ADDR=10.0.0.2 (environment) is" in refused(RESOLVED, **environ)


def test_a_second_launcher_on_a_slurm_node_is_refused() -> None:
    assert "srun --ntasks-per-node=1" in refused(RESOLVED, **SLURM, SLURM_LOCALID="1")


def test_kubernetes_gives_the_rank_and_needs_the_rest() -> None:
    assert "NNODES and MASTER_ADDR are not set" in refused(RESOLVED, JOB_COMPLETION_INDEX="1")
    plan = planned(RESOLVED, JOB_COMPLETION_INDEX="1", NNODES="2", MASTER_ADDR="n1")
    assert (plan.nodes.rank, plan.network.master_addr) == (1, "10.0.0.1")


def test_open_mpi_gives_rank_and_size_for_one_launcher_per_node() -> None:
    world = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}
    assert planned(RESOLVED, **world, OMPI_COMM_WORLD_LOCAL_SIZE="1").nodes.rank == 1
    assert "-npernode 1" in refused(RESOLVED, **world, OMPI_COMM_WORLD_LOCAL_SIZE="2")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ("n1",)),
        ("n[08-10],m", ("n08", "n09", "n10", "m")),
        ("gpu-a[1-2]b[3,5]", ("gpu-a1b3", "gpu-a1b5", "gpu-a2b3", "gpu-a2b5")),
        ("n[1-999999999]", ("n1-999999999",)),
        ("", ()),
    ],
)
def test_slurms_host_lists_are_expanded(text: str, names: tuple[str, ...]) -> None:
    assert expand_nodelist(text) == names


def test_a_machine_without_any_address_is_refused() -> None:
    assert "has no address" in refused(machine(), NODES=NODES, NODE_RANK="1")
    assert LOOPBACK.kind == "loopback"
