"""The connection: whatever comes in is a message, or a refusal that says why."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.gang.connection import (
    MAC,
    MAX_LINE,
    PATIENCE,
    Connection,
    Message,
    ProtocolError,
    UntrustedError,
    dial,
    parse,
    text,
)
from app.gang.handshake import HANDSHAKE, PENDING, STRANGERS, VERSION, Admission, accept, introduce
from app.gang.messages import read_event, read_hello
from tests.unit.launch_facts import card, machine, planned

TOKEN = b"0123456789abcdef"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = [
    "rank",
    "host",
    "instance_id",
    "key",
    "facts",
    "ports",
    "round",
    "failures",
    "progress",
    "code",
    "failed",
    "text",
]
MORE = [
    "exitcode",
    "time",
    "why",
    "port",
    "ranks",
    "sequence",
    "at",
    "collective",
    "group",
    "seconds",
    "targets",
    "key",
]
FIELDS = st.dictionaries(st.sampled_from([*NAMES, *MORE, "failures", "grace", "nnodes", "run_id", "node_rank"]), JSON)
KINDS = st.sampled_from(["beat", "failing", "stalled", "stop", "reached", "ended", "hello", "go", "verdict", ""])


async def pair() -> tuple[Connection, Connection, asyncio.Server]:
    """Two ends of one TCP connection on loopback: (listening side, dialling side)."""
    arrived: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(
        lambda *ends: arrived.set_result(Connection(*ends)), "127.0.0.1", 0, limit=MAX_LINE
    )
    port = server.sockets[0].getsockname()[1]
    dialling = Connection(*await asyncio.open_connection("127.0.0.1", port, limit=MAX_LINE))
    return await arrived, dialling, server


def meet(listening: bytes, dialling: bytes) -> tuple[object, object]:
    """What the handshake gives both sides, with their tokens."""

    async def both() -> tuple[object, object]:
        there, here, server = await pair()
        async with server:
            work = accept(there, listening), introduce(here, dialling, {"run": "r", "told": "facts"})
            first, second = await asyncio.gather(*work, return_exceptions=True)
            there.close()
            here.close()
        return first, second

    return asyncio.run(asyncio.wait_for(both(), HANDSHAKE))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_refusal(line: bytes) -> None:
    try:
        message = parse(line)
    except ProtocolError:
        return
    assert isinstance(message["kind"], str)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 60_000,
        b'{"kind":' * 9_000,
        b'{"kind":"x","n":' + b"9" * 5_000 + b"}",
        b'{"kind":NaN}',
        b'{"kind":"x","n":Infinity}',
        b"\xff\xfe",
        b"",
        b"null",
        b'{"kind":5}',
    ],
)
def test_hostile_json_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(line)


@given(KINDS, FIELDS)
def test_any_fields_are_an_event_a_hello_or_a_refusal(kind: str, fields: dict[str, object]) -> None:
    message = json.loads(json.dumps({**fields, "kind": kind}, allow_nan=True))

    for read in (lambda: read_event(message, 0, 4), lambda: read_hello(message, "10.0.0.1")):
        with contextlib.suppress(ProtocolError):
            read()


@given(st.text())
def test_a_text_never_carries_terminal_commands_or_broken_unicode(value: str) -> None:
    shown = text({"kind": "x", "value": value}, "value")
    assert all(char.isprintable() or char == "\n" for char in shown)
    shown.encode()


def test_both_sides_with_the_same_token_believe_each_other() -> None:
    hello, nothing = meet(TOKEN, TOKEN)
    assert isinstance(hello, dict)
    assert hello["told"] == "facts"
    assert nothing is None


@pytest.mark.parametrize(
    ("listening", "dialling", "cure"),
    [
        (TOKEN, b"fedcba9876543210", "differs from that of node 0"),
        (TOKEN, b"", "Set CLUSTER_TOKEN_FILE"),
        (b"", TOKEN, "node 0 has no CLUSTER_TOKEN_FILE"),
    ],
)
def test_a_token_that_is_missing_or_wrong_ends_both_sides_with_the_cure(
    listening: bytes, dialling: bytes, cure: str
) -> None:
    server_side, client_side = meet(listening, dialling)
    assert isinstance(server_side, UntrustedError)
    assert isinstance(client_side, UntrustedError)
    assert cure in str(client_side)


def test_a_node_of_another_version_is_told_so() -> None:
    async def old_node() -> str:
        there, here, server = await pair()
        async with server:
            here.send("open", v=VERSION + 1, nonce="n")
            with pytest.raises(ProtocolError) as refusal:
                await accept(there, b"")
            assert (await here.receive())["v"] == VERSION
            there.close()
            here.close()
        return str(refusal.value)

    assert f"version {VERSION + 1}" in asyncio.run(old_node())


def test_no_proof_is_given_to_a_peer_that_has_not_proven_itself() -> None:
    async def stranger() -> list[Message]:
        there, here, server = await pair()
        async with server:
            listening = asyncio.ensure_future(accept(there, TOKEN))
            here.send("open", v=VERSION, nonce="n")
            heard = [await here.receive()]
            # Whatever it got it may send back: our own words are no proof either.
            here.send("proof", proof=str(heard[0]["nonce"]), here=here.here)
            with pytest.raises(UntrustedError):
                await listening
            heard.append(await here.receive())
            there.close()
            here.close()
        return heard

    challenge, refusal = asyncio.run(stranger())
    assert challenge.keys() == {"kind", "v", "nonce", "token", "seen", "translated"}
    assert refusal == {"kind": "refuse"}


def test_a_proof_that_is_relayed_is_refused_unless_the_plan_knows_of_address_translation() -> None:
    """A man without the token lets a node of one job prove itself to the coordinator of another."""

    async def relay(*, translated: bool) -> tuple[object, object]:
        arrived: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        victim = await asyncio.start_server(lambda *ends: arrived.set_result(Connection(*ends)), "127.0.0.2", 0)

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            out = await asyncio.open_connection("127.0.0.2", victim.sockets[0].getsockname()[1])
            await asyncio.gather(copy(reader, out[1]), copy(out[0], writer))

        man = await asyncio.start_server(forward, "127.0.0.3", 0)
        async with victim, man:
            own = await dial("127.0.0.1", "127.0.0.3", man.sockets[0].getsockname()[1])
            introducing = asyncio.ensure_future(introduce(own, TOKEN, {"run": "r"}, translated=translated))
            there = await arrived
            answers = await asyncio.gather(introducing, accept(there, TOKEN), return_exceptions=True)
            there.close()
            own.close()
        return answers[0], answers[1]

    client, server = asyncio.run(asyncio.wait_for(relay(translated=False), HANDSHAKE))
    assert isinstance(client, UntrustedError)
    assert "a NAT or proxy that NODES does not tell of" in str(client)
    assert isinstance(server, UntrustedError)
    # One whose plan knows of the translation proves that, too, whatever the other side's plan says.
    client, server = asyncio.run(asyncio.wait_for(relay(translated=True), HANDSHAKE))
    assert client is None
    assert isinstance(server, dict)
    assert server["run"] == "r"


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1000):
            writer.write(data)
    writer.close()


def seen_lines(connection: Connection) -> list[bytes]:
    """From now on, what a man in the middle sees of the lines that `connection` sends."""
    seen: list[bytes] = []
    write = connection._writer.write

    def spy(data: bytes) -> None:
        seen.append(data)
        write(data)

    connection._writer.write = spy  # type: ignore[method-assign, assignment]
    return seen


FORGED: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "added": lambda _lines: b'{"kind":"stop"}\n',
    "added with a MAC of nothing": lambda _lines: b"0" * MAC + b'{"kind":"stop"}\n',
    "repeated": lambda lines: lines["ours"],
    "sent back": lambda lines: lines["theirs"],
    "changed": lambda lines: lines["next"].replace(b"beat", b"stop"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_line_that_a_man_in_the_middle_adds_repeats_sends_back_or_changes_ends_the_connection(forgery: str) -> None:
    async def attack() -> None:
        there, here, server = await pair()
        async with server:
            await asyncio.gather(accept(there, TOKEN), introduce(here, TOKEN, {"run": "r"}))
            from_here, from_there = seen_lines(here), seen_lines(there)
            here.send("beat")
            # The last of these has the number that is due on the other side, which has also said hello.
            for _ in range(3):
                there.send("beat")
            assert await there.receive() == await here.receive() == {"kind": "beat"}
            here._writer.write = from_here.append  # type: ignore[method-assign, assignment]
            here.send("beat")
            lines = {"ours": from_here[0], "theirs": from_there[-1], "next": from_here[-1]}
            here._writer.transport.write(FORGED[forgery](lines))
            with pytest.raises(UntrustedError):
                await asyncio.wait_for(there.receive(), 5)
            there.close()
            here.close()

    asyncio.run(attack())


def test_strangers_that_say_nothing_do_not_take_the_places_of_listed_nodes() -> None:
    plan = planned(machine(card("eth0", "10.0.0.1/24")), TRAIN_SCRIPT=__file__, NODES="10.0.0.1,10.0.0.2")

    async def crowd() -> list[str]:
        admission = Admission(plan=plan, token=b"")
        waiting, refused = [], []
        for number in range(STRANGERS + 8):
            address = f"10.1.0.{number + 1}"
            waiting.append(asyncio.ensure_future(admission.admit(Silent(address))))
        waiting += [asyncio.ensure_future(admission.admit(Silent("10.0.0.2"))) for _ in range(PENDING + 1)]
        await asyncio.sleep(0)
        refused = [str(one.exception()) for one in waiting if one.done()]
        listed = [one.done() for one in waiting[-PENDING - 1 :]]
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert listed == [False] * PENDING + [True]
        return refused

    assert asyncio.run(crowd()) == ["too many connections without a handshake"] * 9


class Silent(Connection):
    """FAKE: somebody at an address who connects and says nothing."""

    def __init__(self, peer: str) -> None:
        self.peer = peer

    async def receive(self) -> Message:
        await asyncio.sleep(60)
        raise AssertionError("it says nothing")


def test_a_peer_that_does_not_read_is_dropped_instead_of_filling_the_memory() -> None:
    async def flood() -> bool:
        there, here, server = await pair()
        async with server:
            for _ in range(400):
                there.send("news", text="x" * 60_000)
            got = 0
            with contextlib.suppress(ConnectionError):
                while await asyncio.wait_for(here.receive(), 5):
                    got += 1
            here.close()
            assert got < 400
        return True

    assert asyncio.run(flood())


@pytest.mark.parametrize("seconds", [0.5, 8, 800_000 * PATIENCE, 1e15])
def test_any_heartbeat_timeout_is_a_limit_of_the_kernel(seconds: float) -> None:
    async def limited() -> int:
        there, here, server = await pair()
        async with server:
            here.give_up_after(seconds)
            found = here._writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            there.close()
            here.close()
        return int(found)

    assert asyncio.run(limited()) == min(seconds * 1000, 2**31 - 1)
