"""What we need of `qemu.qmp.QMPClient` beyond what it does by default."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress

from qemu.qmp import EventListener, QMPClient
from qemu.qmp.message import Message

from qmpcommit.qmp.address import peer_pid

READ_LIMIT = 64 * 1024 * 1024
"""Bytes that one QMP message may have; a schema is 0.25 MB, 200 layers with bitmaps a few MB."""

PATIENCE = 2.0
"""Seconds for which the end of a connection is waited for, and once more when it was hung up."""

# What qemu.qmp logs as errors reaches our callers as exceptions; without a handler of the
# application's own, Python would print those lines to standard error.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Client(QMPClient):
    """`QMPClient` that renders messages for its debug log only where somebody reads it."""

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
    client = Client(name, readbuflen=READ_LIMIT)
    client.events.event_filter = lambda message: False  # its history would grow for ever
    client.register_listener(tap)
    return client


def client_pid(client: QMPClient) -> int | None:
    """The process behind a connected client, where it is a Unix socket's and that can be told."""
    writer = getattr(client, "_writer", None)
    sock = writer.get_extra_info("socket") if writer is not None else None
    if sock is None:
        return None
    try:
        return peer_pid(sock)
    except (OSError, AttributeError, TypeError):  # another transport than asyncio's own
        return None


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
