"""Connections to the API: bounded by listener and by user, and cut where they ask for nothing.

`Door` counts them; `PeerProtocol` is uvicorn's HTTP protocol that passes one, reads
``SO_PEERCRED`` of each connection to the Unix socket, and waits for nobody long.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, Self

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qmpcommit.daemon.config import Limits

HEAD = 10.0
"""Seconds that a connection gets for a request's header: the first one, or one that has begun."""


class Peer(NamedTuple):
    """Who is at the other end of a Unix socket."""

    pid: int
    uid: int
    gid: int


class Connection(Protocol):
    """What a door counts."""

    @property
    def idle(self) -> bool:
        """Whether nothing is being answered."""

    def cut(self) -> None:
        """End it at once."""


class Door:
    """The open connections of one listener: at most `room`, and at most `each` of one user.

    Where there is no room, the oldest that asks for nothing makes it.
    """

    def __init__(self, room: int, each: int) -> None:
        self.bounds = (room, each)
        self._open: dict[Connection, int | None] = {}
        self._of: Counter[int | None] = Counter()

    def enter(self, one: Connection, user: int | None) -> bool:
        """Whether there is room for one more of that user."""
        room, most = self.bounds
        if self._of[user] >= most and not self._make_room([user]):
            return False
        if len(self._open) >= room and not self._make_room(list(self._of)):
            return False
        self._open[one] = user
        self._of[user] += 1
        return True

    def leave(self, one: Connection) -> None:
        """It is closed; safe to repeat."""
        if one in self._open:
            user = self._open.pop(one)
            self._of[user] -= 1
            if not self._of[user]:
                del self._of[user]

    def _make_room(self, users: list[int | None]) -> bool:
        for each, user in self._open.items():
            if user in users and each.idle:
                self.leave(each)
                each.cut()
                return True
        return False


class Doors:
    """The Unix socket's and TCP's, neither of which can take all files of the process."""

    def __init__(self, limits: Limits, files: int) -> None:
        room = min(limits.connections, files // 3)
        self.unix = Door(room, max(1, min(limits.connections_per_user, room * 3 // 4)))
        tcp = min(limits.connections_tcp, files // 8)
        self.tcp = Door(tcp, tcp)

    def exchange(self, limits: Limits) -> None:
        """Go on by other limits; who is in stays."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        new = Doors(limits, files if files > 0 else limits.connections * 8)
        self.unix.bounds, self.tcp.bounds = new.unix.bounds, new.tcp.bounds

    @classmethod
    def of(cls, limits: Limits) -> Self:
        """Within the files that this process may open, which are as many as it can have."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        return cls(limits, soft if soft > 0 else limits.connections * 8)


class PeerProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which tells the application its peer and waits for nobody long."""

    def __init__(self, *, doors: Doors, **given: Any) -> None:
        super().__init__(**given)
        self._doors = doors
        self._door: Door | None = None
        self._head: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def cut(self) -> None:
        """End it at once."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        peer = peer_of(transport)
        self.app_state = {**self.app_state, "peer": peer}
        self._door = self._doors.tcp if peer is None else self._doors.unix
        if self._door.enter(self, peer.uid if peer is not None else None):
            self._await_head()
        else:
            self._say(503, "Busy", "there are as many connections as there may be", b"Busy")

    def data_received(self, data: bytes) -> None:
        """A part of a request, or more than one."""
        super().data_received(data)
        self._await_head()

    def on_response_complete(self) -> None:
        """One is answered; another may have begun meanwhile."""
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._await_head()

    def _await_head(self) -> None:
        if not self.idle and self._head is not None:
            self._head.cancel()
            self._head = None
        elif self.idle and self._head is None:
            self._head = self.loop.call_later(HEAD, self._too_slow)

    def _too_slow(self) -> None:
        self._head = None
        if self.idle:
            self.cut()

    def timeout_keep_alive_handler(self) -> None:
        """It asks for nothing more, and may not even have read what it was answered."""
        self.cut()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP; an answer that has begun is broken off."""
        self._say(400, "Malformed", msg, b"Bad Request")

    def _say(self, status: int, title: str, detail: str, reason: bytes) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers, body = problem(status, title, detail)
            for event in (
                h11.Response(status_code=status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has hung up."""
        if self._head is not None:
            self._head.cancel()
        if self._door is not None:
            self._door.leave(self)
        super().connection_lost(exc)


def peer_of(transport: asyncio.Transport) -> Peer | None:
    """The peer's credentials; None for a TCP connection."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    size = struct.calcsize("3i")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return Peer(*struct.unpack("3i", raw))


def problem(status: int, title: str, detail: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """A problem document, after which the connection is closed: its headers and its body."""
    kind = f"urn:qmpcommit:http:{status}"
    body = json.dumps({"type": kind, "title": title, "status": status, "detail": detail}).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"2"))
    return headers, body
