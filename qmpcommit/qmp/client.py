"""What we need of `qemu.qmp.QMPClient` beyond what it does by default."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from qemu.qmp import EventListener, QMPClient
from qemu.qmp.message import Message

from qmpcommit.qmp.address import peer_pid
from qmpcommit.qmp.reading import CHUNK, MESSAGE, Breach, Lines, bound_of, check_size, read_message

PATIENCE = 2.0
"""Seconds for which the end of a connection is waited for, and once more when it was hung up."""

# What qemu.qmp logs as errors reaches our callers as exceptions; without a handler of the
# application's own, Python would print those lines to standard error.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Client(QMPClient):
    """`QMPClient` that reads no more than QEMU would say.

    `breach` is how what answers has broken the bounds, or the protocol; empty while it has not.
    Messages are rendered for the debug log only where somebody reads it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, readbuflen=CHUNK)
        self.breach = ""
        self._bounds: dict[object, int] = {}  # of replies that may come, by their ids
        self._lines: Lines | None = None
        self._transport: asyncio.WriteTransport | None = None

    async def _do_connect(self, address: Any, ssl: Any = None) -> None:
        await super()._do_connect(address, ssl)
        assert self._writer is not None
        self._transport = self._writer.transport

    def let_go(self, sock: socket.socket) -> None:
        """Close the socket that this was to be connected by.

        The loop knows a transport's socket by its number. Were it closed beneath the transport,
        the next one of that number, which may be anybody's, would never be read.
        """
        if self._transport is None:
            sock.close()
        else:
            self._transport.abort()

    def _bound(self) -> int:
        return max(self._bounds.values(), default=MESSAGE)

    async def _do_recv(self) -> Message:
        """The next message; raises OSError, EOFError or `Breach`."""
        if self._lines is None:
            assert self._reader is not None
            self._lines = Lines(self._reader, self._bound)
        try:
            line = await self._lines.next()
            check_size(len(line), self._bound())
            message = await read_message(line)
            answers = "return" in message and "event" not in message
            known_as = message.get("id") if answers else None
            known_as = known_as if isinstance(known_as, str) else None
            check_size(len(line), self._bounds.get(known_as, MESSAGE))
            if known_as not in self._bounds:
                self._lines.unasked(len(line))
        except Breach as breach:
            self.breach, self._lines = str(breach), None  # nor is kept what came behind it
            raise
        self._bounds.pop(known_as, None)
        return message

    async def _on_message(self, msg: Message) -> None:
        known_as = msg.get("id")
        if "event" in msg or not isinstance(known_as, str) or known_as in self._pending:
            await super()._on_message(msg)
        # Else nobody waits for it any more. QMPClient would render it, however large, for its log.

    async def _issue(self, msg: Message) -> str | None:
        known_as = await super()._issue(msg)
        # Of one that nobody waits for any more the reply may come yet.
        self._bounds[known_as] = bound_of(msg.get("execute"))
        return known_as

    def _cb_inbound(self, msg: Message) -> Message:
        return super()._cb_inbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg


class Tap(EventListener):
    """Hands each event straight on; keeps no queue and no history."""

    def __init__(self, sink: Callable[[Message], None]) -> None:
        super().__init__()
        self._sink = sink

    async def put(self, event: Message) -> None:
        """Called by the reader, in its own step."""
        self._sink(event)


def new_client(name: str, tap: Tap) -> Client:
    """A client whose events go to `tap` alone, from before it is connected."""
    client = Client(name)
    client.events.event_filter = lambda message: False  # its history would grow for ever
    client.register_listener(tap)
    return client


def client_pid(client: QMPClient) -> int | None:
    """The process behind a connected client, where it is a Unix socket's and that can be told.

    None where that is this process: one that listened and handed the socket to QEMU, or a proxy.
    """
    writer = getattr(client, "_writer", None)
    sock: Any = writer.get_extra_info("socket") if writer is not None else None
    try:
        # Of the socket a loop that is not asyncio's own may show little but its number.
        with socket.socket(fileno=os.dup(sock.fileno())) as same:
            pid = peer_pid(same)
    except (OSError, AttributeError, TypeError, ValueError):
        return None
    return pid if pid != os.getpid() else None


def hang_up(sock: socket.socket) -> None:
    """End a connection at once, whatever is still to be sent."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


async def dispose(client: QMPClient, sock: socket.socket | None) -> None:
    """Disconnect a client of ours whatever state it is in, within seconds; never raises."""
    closing = asyncio.ensure_future(client.disconnect())
    done, _ = await asyncio.wait({closing}, timeout=PATIENCE)
    if not done and sock is not None:
        hang_up(sock)  # a stopped QEMU reads nothing, so the flush above would wait for ever
        done, _ = await asyncio.wait({closing}, timeout=PATIENCE)
    if not done:
        closing.cancel()
        await asyncio.wait({closing})
    if not closing.cancelled():
        closing.exception()  # how the connection ended was told where it mattered
