"""What holds for whatever settings and machine: a plan or problems, the user wins, reasons, sameness, all ranks."""

from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from app.cli.explain import short, to_json, to_lines, to_table
from app.config.settings import TABLE, read_settings
from app.host import Host
from app.host.accelerators.gpu import Gpu, Gpus
from app.host.limits import Limits
from app.host.names import Answer
from app.host.nics import Address, Nic
from app.host.paths import Seen
from app.host.rdma import Gid, RdmaPort, RdmaSoftware
from app.plan import Plan, draft, make_plan, probe_for
from tests.unit.launch_facts import card, machine

ADDRESSES = st.sampled_from(
    [
        *(f"10.0.0.{last}" for last in (1, 2, 3)),
        *("192.168.1.1", "127.0.0.1", "127.0.0.2", "127.0.1.1", "2001:db8::1", "fe80::1", "::1", "172.17.0.1"),
    ]
)
WORDS = st.one_of(
    st.text(max_size=12),
    st.integers(-2, 70000).map(str),
    ADDRESSES,
    st.lists(st.one_of(ADDRESSES, st.sampled_from(["a", "b", "no"])), max_size=4).map(",".join),
    st.sampled_from(["auto", "gpu", "cpu", "nccl", "gloo", "nvidia", "cpu", "-m", "x.py", "'"]),
)
FOREIGN = (
    *("PET_NNODES", "SLURM_NODEID", "SLURM_JOB_NODELIST", "SLURM_NNODES", "JOB_COMPLETION_INDEX", "NODERANK"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "NCCL_P2P_DISABLE", "NCCL_IB_GID_INDEX", "NCCL_IB_ADDR_RANGE"),
    "CUDA_VISIBLE_DEVICES",
)
NAMES = st.sampled_from([*(setting.name for setting in TABLE), *FOREIGN])
ENVIRON = st.dictionaries(NAMES, WORDS, max_size=8)
KINDS = ("ethernet", "infiniband", "loopback", "bond", "vlan", "bridge", "tunnel", "virtual", "container")
SEEN = st.builds(
    Seen, kind=st.sampled_from(["file", "folder", "missing", "unreadable"]), obstacle=st.sampled_from(["", "", "/ro"])
)
INTERFACE_NAMES = st.sampled_from(["eth0", "eth1", "ib0", "bond0", "docker0", "lo"])


@st.composite
def nics(draw: st.DrawFn) -> Nic:
    found = draw(st.lists(ADDRESSES, max_size=2))
    return Nic(
        name=draw(INTERFACE_NAMES),
        addresses=tuple(Address(text=text, prefix=draw(st.integers(0, 32))) for text in found),
        kind=draw(st.sampled_from(KINDS)),
        up=draw(st.booleans()),
        speed=draw(st.one_of(st.none(), st.sampled_from([10, 1000, 400000]))),
        mtu=draw(st.one_of(st.none(), st.sampled_from([1500, 9000]))),
        lower=tuple(draw(st.lists(INTERFACE_NAMES, max_size=2))),
        pci=tuple(draw(st.lists(st.sampled_from(["pci0000:00", "0000:00:01.0", "0000:01:00.0"]), max_size=3))),
    )


@st.composite
def ports(draw: st.DrawFn) -> RdmaPort:
    slot = st.builds(
        Gid,
        index=st.integers(0, 5),
        text=st.sampled_from(
            ["fe80:0000:0000:0000:0000:0000:0000:0001", "0000:0000:0000:0000:0000:ffff:0a00:0001", "x"]
        ),
        kind=st.sampled_from(["", "RoCE v2", "IB/RoCE v1"]),
        netdev=INTERFACE_NAMES,
    )
    return RdmaPort(
        device=draw(st.sampled_from(["mlx5_0", "mlx5_1", "mlx5_10"])),
        port=draw(st.integers(1, 2)),
        state=draw(st.sampled_from(["ACTIVE", "DOWN", "INIT", ""])),
        link_layer=draw(st.sampled_from(["InfiniBand", "Ethernet"])),
        rate=draw(st.sampled_from([0.0, 25.0, 400.0])),
        lid=draw(st.integers(0, 1)),
        sm_lid=draw(st.integers(0, 1)),
        netdevs=tuple(draw(st.lists(INTERFACE_NAMES, max_size=2))),
        gids=tuple(draw(st.lists(slot, max_size=3))),
        openable=draw(st.booleans()),
    )


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    small = st.one_of(st.none(), st.integers(0, 1 << 35))
    return Host(
        uid=draw(st.integers(0, 1)),
        container=draw(st.booleans()),
        nics=tuple(draw(st.lists(nics(), max_size=4))),
        rdma_ports=tuple(draw(st.lists(ports(), max_size=4))),
        rdma_software=RdmaSoftware(
            dev_infiniband=draw(st.booleans()), library=draw(st.booleans()), providers=("mlx5",)
        ),
        gpus=Gpus(
            visible=tuple(Gpu(index=index) for index in range(draw(st.integers(0, 3)))), on_bus=("0000:01:00.0",)
        ),
        limits=Limits(cpus=draw(st.integers(1, 9)), memory=draw(small), memlock=draw(small), shm=draw(small)),
        answers={"a": Answer(addresses=("10.0.0.1",)), "b": Answer(addresses=("127.0.1.1", "2001:db8::1"))},
        files={path: draw(SEEN) for path in ("x.py", "runs/default", "-m")},
        module=draw(st.booleans()),
        packages=draw(st.sampled_from([{}, {"torch": "2.13.0"}, {"torch": "2.13.0+cpu"}])),
    )


@settings(max_examples=150, deadline=None)
@given(ENVIRON, hosts())
def test_there_is_a_plan_or_a_list_of_problems_and_never_an_exception(environ: dict[str, str], host: Host) -> None:
    wanted = read_settings(environ, None)
    result = make_plan(wanted, host)
    assert isinstance(result, Plan) or (result and all(problem.message for problem in result))
    found = draft(wanted, host)
    assert to_lines(found)
    assert to_json(found)
    assert to_table(found, 80, colour=True)
    if isinstance(result, Plan):
        assert len(short(result).splitlines()) == 6


@settings(max_examples=100, deadline=None)
@given(ENVIRON, hosts())
def test_what_the_user_set_is_never_replaced(environ: dict[str, str], host: Host) -> None:
    plan = make_plan(read_settings(environ, None), host)
    if isinstance(plan, Plan):
        # BACKEND is resolved for the script; RUN_DIR, CHECKPOINT_DIR and PYTHONPATH are made absolute or prefixed.
        resolved = {"BACKEND", "RUN_DIR", "CHECKPOINT_DIR", "PYTHONPATH"}
        kept = {name for name, text in environ.items() if text.strip()} - resolved
        assert not kept & plan.script.env.keys()
        assert not {name for name in kept & set(plan.script.removed) if not name.startswith("PET_")}


@settings(max_examples=100, deadline=None)
@given(ENVIRON, hosts())
def test_no_decision_is_without_a_source_and_a_reason(environ: dict[str, str], host: Host) -> None:
    for decision in draft(read_settings(environ, None), host).decisions:
        assert decision.name
        assert decision.source
        assert decision.reason, decision


@settings(max_examples=60, deadline=None)
@given(ENVIRON, hosts())
def test_the_same_input_gives_the_same_plan(environ: dict[str, str], host: Host) -> None:
    wanted = read_settings(environ, None)
    again = read_settings(dict(reversed(environ.items())), None)
    assert draft(wanted, host) == draft(again, replace(host))


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(1, 7)), st.integers(1, 6), st.booleans())
def test_the_ranks_of_all_nodes_are_a_permutation(order: list[int], size: int, bridges: bool) -> None:
    addresses = [f"10.0.0.{number}" for number in order[:size]]
    ranks, worlds, equal = [], set(), set()
    for address in addresses:
        extra = (card("docker0", "172.17.0.1/16", kind="container"),) if bridges else ()
        plan = make_plan(
            read_settings({"NODES": ",".join(addresses), "NPROC_PER_NODE": "2"}, None),
            machine(card(f"eth{address[-1]}", f"{address}/24"), *extra),
        )
        assert isinstance(plan, Plan)
        assert plan.nodes.addresses[plan.nodes.rank] == plan.network.address == address
        ranks += [plan.nodes.rank * plan.workers.nproc + local for local in range(plan.workers.nproc)]
        worlds.add(plan.world_size)
        equal.add(plan.equal)
    assert sorted(ranks) == list(range(2 * size))
    assert worlds == {2 * size}
    assert len(equal) == 1


WORKERS = {
    "NCCL_IB_HCA": st.sampled_from(["=mlx5_0:1", "mlx5_1", "^mlx5_0", "=mlx5_9", "mlx5_1:2,mlx5_0", "=", "^"]),
    "NCCL_IB_DISABLE": st.sampled_from(["0", "1"]),
    "NCCL_NET": st.sampled_from(["Socket", "IB", "plugin"]),
    "NCCL_IB_GID_INDEX": st.sampled_from(["-1", "3", "x"]),
    "NCCL_SOCKET_IFNAME": st.sampled_from(["eth", "=eth9", "^lo"]),
    "GLOO_SOCKET_IFNAME": st.sampled_from(["eth0", "=eth0"]),
    "CUDA_VISIBLE_DEVICES": st.sampled_from(["0", "1,0", "0,0", "-1", "GPU-x"]),
    "NPROC_PER_NODE": st.sampled_from(["auto", "cpu", "1"]),
    "HARDWARE": st.just("cpu"),
    "OMP_NUM_THREADS": st.sampled_from(["1", "7"]),
    "MASTER_PORT": st.sampled_from(["5000", "65535"]),
    "CONTROL_PORT": st.sampled_from(["6000", "1025"]),
}


@st.composite
def clusters(draw: st.DrawFn) -> tuple[dict[str, str], Host, int]:
    """Settings and machine of one node of a cluster as they should be, with any worker variables, and its rank."""
    size = draw(st.integers(2, 5))
    rank = draw(st.integers(0, size - 1))
    nics = machine(card("eth0", f"10.0.0.{rank + 1}/24"), card("ib0", "10.1.0.1/16"), card("docker0")).nics
    host = replace(
        draw(hosts()),
        nics=nics,
        gpus=Gpus(visible=tuple(Gpu(index=index) for index in range(draw(st.integers(0, 2))))),
        limits=Limits(cpus=4),
        files={},
        module=True,
    )
    nodes = ",".join(f"10.0.0.{number + 1}" for number in range(size))
    return {"NODES": nodes, **draw(st.fixed_dictionaries({}, optional=WORKERS))}, host, rank


@settings(max_examples=150, deadline=None)
@given(clusters())
def test_a_node_of_a_cluster_has_a_plan_that_keeps_its_users_variables(
    cluster: tuple[dict[str, str], Host, int],
) -> None:
    environ, host, rank = cluster
    plan = make_plan(read_settings(environ, None), host)
    assert isinstance(plan, Plan), plan
    assert (plan.nodes.rank, plan.network.address) == (rank, f"10.0.0.{rank + 1}")
    assert (
        len(
            {
                plan.network.master_port,
                plan.network.control_port,
                int(plan.script.env["NCCL_RAS_ADDR"].rpartition(":")[2]),
            }
        )
        == 3
    )
    assert str(plan.network.master_port) == environ.get("MASTER_PORT", "29400")
    assert not environ.keys() & plan.script.env.keys()
    assert not environ.keys() & set(plan.script.removed)
    decided = {each.name: each.value for each in plan.decisions}
    kept = [name for name in environ if name.startswith(("NCCL_", "GLOO_", "OMP_"))]
    assert {name: decided.get(name) for name in kept} == {name: environ[name] for name in kept}
    if environ.get("NCCL_IB_DISABLE") == "1" or environ.get("NCCL_NET") == "Socket":
        assert plan.network.transport == "sockets"
    lines = short(plan).splitlines()
    assert len(lines) == 6
    assert ("RDMA through" in lines[1]) == (plan.network.transport != "sockets" and plan.workers.backend == "nccl")


def test_facts_below_an_empty_root_are_absent_and_not_an_error(tmp_path: Path) -> None:
    found = draft(read_settings({}, None), probe_for(read_settings({}, None), tmp_path))
    assert found.plan is not None
    assert found.plan.network.interface == "lo"
