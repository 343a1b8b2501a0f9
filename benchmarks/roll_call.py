"""Time, node 0's memory and messages of the roll call, agreement and reach test, against the number of nodes.

    python benchmarks/roll_call.py [--nodes 2,8,64,256,1000] [--rounds 3]

Node 0 is a process of its own; the other nodes are participants in one process for each 250, every node with a loopback
address of its own and real sockets. Seconds are from the moment that all processes run until every node was told to
start torchrun. The simulation of the others shares this machine's cores with node 0: on a real cluster each node pays
only for itself, and node 0's own part is the column "node 0 CPU". Nothing is trained.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.engine.outcome import Outcome
from app.gang import connect, connection, connectivity, handshake, probes
from app.gang.agreement import gather
from app.gang.coordinator import Coordinator
from app.gang.mirror.pages import pages
from app.gang.participant import Participant
from app.gang.services import NodeServices, RoundAssignment
from app.plan import Plan
from app.plan.parts import CheckpointExchange, JobNodes, LocalWorkers, Monitoring, Network, Script, Timeouts
from app.supervise import node as supervise

SHARE = 250
"""JobNodes of one process: each holds up to 27 sockets at once, and processes have a limit of them."""
PATIENCE = 120.0
"""Seconds. The product's limits are for machines of their own, not for 1,000 nodes on two cores."""


class NoEngine:
    """FAKE torchrun that has ended well as soon as it is started: what comes after the start is not measured."""

    async def watch(self, _failing: object) -> Outcome:
        return Outcome(code=0)

    async def end(self, *, gently: bool, grace: float) -> None: ...

    def kill(self) -> None: ...


def make_plan(count: int, rank: int, port: int) -> Plan:
    nodes = tuple(f"127.{1 + number // 62_500}.{number // 250 % 250}.{number % 250 + 1}" for number in range(count))
    equal = {"NODES": ",".join(nodes), "NNODES": str(count), "torch": "2.13.0", "TRAIN_SCRIPT": "train.py"}
    return Plan(
        run_name="roll-call",
        nodes=JobNodes(rank=rank, addresses=nodes, names=nodes, minimum=count),
        network=Network(
            interface="lo",
            address=nodes[rank],
            transport="sockets",
            master_addr=nodes[0],
            master_port=port,
            control_port=port + 1,
        ),
        workers=LocalWorkers(nproc=8, backend="gloo", gpus=0),
        script=Script(
            command=("train.py",), run_dir=Path("/nonexistent/run"), checkpoint_dir=Path("/nonexistent/run/checkpoints")
        ),
        checkpoints=CheckpointExchange(mirror=False, keep=2, limit=0),
        timeouts=Timeouts(
            start=PATIENCE, rejoin=PATIENCE, stop_grace=1, heartbeat=PATIENCE, hang_report=0.0, hang_timeout=0.0
        ),
        monitoring=Monitoring(),
        max_restarts=0,
        stopped_exit_code=143,
        token_file=None,
        equal=tuple(sorted(equal.items())),
        decisions=(),
        warnings=(),
    )


def participant(plan: Plan, token: bytes, given: dict[str, object], started: list[float]) -> Participant:
    def launch(_place: RoundAssignment) -> NoEngine:
        started.append(time.time())
        return NoEngine()

    async def answer(_question: str, _told: connection.Message) -> dict[str, object]:
        (page,) = pages({"problem": ""})  # no folder of checkpoints
        return {"page": page, "more": False}

    services = NodeServices(
        launch=launch,
        answer=answer,
        say=lambda _text: None,
        **given,  # type: ignore[arg-type]  # the way to dial, which differs between node 0 and the others
    )
    return Participant(plan, token, gather(plan), services)


async def be_node_0(count: int, port: int, token: bytes) -> dict[str, float]:
    plan = make_plan(count, 0, port)
    messages = count_messages()
    before = resource.getrusage(resource.RUSAGE_SELF)
    head = Coordinator(plan, token, lambda text: print(text, file=sys.stderr))
    server = await connection.listen(head.serve, plan.nodes.addresses[0], plan.network.control_port, count)
    begun = time.time()
    started: list[float] = []
    leading = asyncio.ensure_future(head.run())
    verdict = await participant(plan, token, {"dial": connection.dial_inside(head.serve)}, started).take_part()
    await leading
    server.close()
    if verdict.code:
        raise SystemExit(f"the roll call failed: {verdict.text[:2000]}")
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"begun": begun, "cpu": cpu, "kib": after.ru_maxrss - before.ru_maxrss, "messages": messages[0]}


def count_messages() -> list[int]:
    """Counts what passes node 0's wires from now on, beats apart (none fall into the time measured)."""
    counted = [0]
    send, receive = connection.Connection.send, connection.Connection.receive

    def sending(self: connection.Connection, kind: str, **fields: object) -> None:
        counted[0] += 1
        send(self, kind, **fields)

    async def receiving(self: connection.Connection) -> connection.Message:
        message = await receive(self)
        counted[0] += 1
        return message

    connection.Connection.send, connection.Connection.receive = sending, receiving  # type: ignore[method-assign]  # a counter, here only
    return counted


async def be_the_others(count: int, ranks: range, port: int, token: bytes) -> float:
    """Runs the nodes of `ranks`; returns when the last of them was told to start."""
    started: list[float] = []
    plans = [make_plan(count, rank, port) for rank in ranks]
    participants = [participant(plan, token, {"dial": supervise._dial(plan)}, started) for plan in plans]
    verdicts = await asyncio.gather(*(one.take_part() for one in participants))
    wrong = [verdict.text for verdict in verdicts if verdict.code]
    if wrong:
        raise SystemExit(f"{len(wrong)} nodes failed: {wrong[0][:500]}")
    return max(started)


def measure(count: int, port: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--count", str(count), "--port", str(port), "--ranks"]
    shares = [range(0, 1), *(range(first, min(first + SHARE, count)) for first in range(1, count, SHARE))]
    processes = [
        subprocess.Popen([*command, f"{ranks.start}-{ranks.stop}"], stdout=subprocess.PIPE, text=True)
        for ranks in shares
    ]
    try:
        node0, *others = (json.loads(process.communicate(timeout=2 * PATIENCE)[0]) for process in processes)
    finally:
        for process in processes:
            process.kill()
    # From the moment that everybody was there: processes of Python do not start all at once.
    begun = max(one["begun"] for one in (node0, *others))
    return {**node0, "seconds": max(one["last"] for one in others) - begun}


def widen() -> None:
    """Room for 1,000 nodes in one process, and patience with them."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    probes.CONNECT = probes.PASS = PATIENCE
    for module in (connect, handshake):
        setattr(module, "HANDSHAKE", PATIENCE)  # noqa: B010 - each module has its own name for it


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="2,8,64,256,1000", help="numbers of nodes, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the median is shown")
    parser.add_argument("--port", type=int, default=21_400)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    widen()
    if told.ranks:
        first, _, end = told.ranks.partition("-")
        begun, token = time.time(), b"0123456789abcdef"
        if first == "0":
            print(json.dumps(asyncio.run(be_node_0(told.count, told.port, token))))
        else:
            last = asyncio.run(be_the_others(told.count, range(int(first), int(end)), told.port, token))
            print(json.dumps({"begun": begun, "last": last}))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}")
    print("| nodes | seconds | node 0 CPU s | node 0 memory MiB | messages at node 0 | dials per node |")
    print("|---|---|---|---|---|---|")
    for count in map(int, told.nodes.split(",")):
        rounds = [measure(count, told.port + 2 * number) for number in range(told.rounds)]
        seconds, cpu, kib, messages = (
            statistics.median(one[name] for one in rounds) for name in ("seconds", "cpu", "kib", "messages")
        )
        dials = max(len(connectivity.targets(index, count)) for index in range(count))
        print(f"| {count} | {seconds:.2f} | {cpu:.2f} | {kib / 1024:.1f} | {messages:.0f} | {dials} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
