"""The wire: whatever comes in is a message, or a refusal that says why."""

import asyncio
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.gang.connection import (
    HANDSHAKE,
    MAX_LINE,
    VERSION,
    UntrustedError,
    Wire,
    WireError,
    challenge,
    introduce,
    parse,
    text,
)
from app.gang.messages import read_event, read_hello

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = ["rank", "host", "life", "key", "facts", "ports", "round", "failures", "progress", "code", "failed", "text"]
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


async def pair() -> tuple[Wire, Wire, asyncio.Server]:
    """Two ends of one TCP connection on loopback: (listening side, dialling side)."""
    arrived: asyncio.Future[Wire] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda *ends: arrived.set_result(Wire(*ends)), "127.0.0.1", 0, limit=MAX_LINE)
    port = server.sockets[0].getsockname()[1]
    dialling = Wire(*await asyncio.open_connection("127.0.0.1", port, limit=MAX_LINE))
    return await arrived, dialling, server


def meet(listening: bytes, dialling: bytes) -> tuple[object, object]:
    """What the handshake gives both sides, with their tokens."""

    async def both() -> tuple[object, object]:
        there, here, server = await pair()
        async with server:
            work = challenge(there, listening), introduce(here, dialling, {"run": "r", "told": "facts"})
            first, second = await asyncio.gather(*work, return_exceptions=True)
            there.close()
            here.close()
        return first, second

    return asyncio.run(asyncio.wait_for(both(), HANDSHAKE))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_refusal(line: bytes) -> None:
    try:
        message = parse(line)
    except WireError:
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
    with pytest.raises(WireError):
        parse(line)


@given(KINDS, FIELDS)
def test_any_fields_are_an_event_a_hello_or_a_refusal(kind: str, fields: dict[str, object]) -> None:
    message = json.loads(json.dumps({**fields, "kind": kind}, allow_nan=True))

    for read in (lambda: read_event(message, 0, 4), lambda: read_hello(message, "10.0.0.1", 4)):
        with contextlib.suppress(WireError):
            read()


@given(st.text())
def test_a_text_never_carries_terminal_commands_or_broken_unicode(value: str) -> None:
    shown = text({"kind": "x", "value": value}, "value")
    assert all(char.isprintable() or char == "\n" for char in shown)
    shown.encode()


def test_both_sides_with_the_same_token_believe_each_other() -> None:
    hello, nothing = meet(b"0123456789abcdef", b"0123456789abcdef")
    assert isinstance(hello, dict)
    assert hello["told"] == "facts"
    assert nothing is None


@pytest.mark.parametrize(
    ("listening", "dialling", "cure"),
    [
        (b"0123456789abcdef", b"fedcba9876543210", "differs from that of node 0"),
        (b"0123456789abcdef", b"", "Set CLUSTER_TOKEN_FILE"),
        (b"", b"0123456789abcdef", "node 0 has no CLUSTER_TOKEN_FILE"),
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
            with pytest.raises(WireError) as refusal:
                await challenge(there, b"")
            assert (await here.receive())["v"] == VERSION
            there.close()
            here.close()
        return str(refusal.value)

    assert f"version {VERSION + 1}" in asyncio.run(old_node())


def test_a_proof_of_one_side_is_none_for_the_other() -> None:
    """A liar who has no token sends our own challenge back to us, and hopes that we prove ourselves to ourselves."""

    async def reflect() -> object:
        there, here, server = await pair()
        async with server:
            here.send("open", v=VERSION, nonce="n")
            listening = asyncio.ensure_future(challenge(there, b"0123456789abcdef"))
            answer = await here.receive()
            here.send("hello", proof=answer["proof"])
            result = (await asyncio.gather(listening, return_exceptions=True))[0]
            there.close()
            here.close()
        return result

    assert isinstance(asyncio.run(reflect()), UntrustedError)


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
