"""Ports for launchers on this machine."""

import contextlib
import secrets
import socket


def free_port() -> int:
    """A port that is free together with the next two, below those that the kernel hands out by itself: a port from
    there may belong to any connection of this machine a moment later."""
    while True:
        port = secrets.choice(range(15_000, 32_000))
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for offset in range(3):
                stack.enter_context(socket.socket()).bind(("", port + offset))
            return port
