"""Where a monitor listens: a Unix socket's path, or ``tcp:HOST:PORT``."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from collections.abc import Callable
from typing import NamedTuple

from qmpcommit.errors import InvalidRequest

AGAIN = 0.05
"""Seconds after which a socket is tried again that has others waiting."""

SUN_PATH = 107
"""Bytes that Linux's struct sockaddr_un holds, less the closing NUL."""


class Address(NamedTuple):
    """A parsed monitor address; `str()` gives it back as people write it."""

    path: str | None = None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path is not None:
            return self.path
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> Address:
        """Read ``/path``, ``unix:/path`` or ``tcp:HOST:PORT`` (raises `InvalidRequest`)."""
        text = os.fspath(text)
        if text.startswith("tcp:"):
            host, _, port = text[4:].rpartition(":")
            if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
                raise InvalidRequest(
                    f"'{text}' is no monitor address; write tcp:HOST:PORT, as in tcp:127.0.0.1:4444"
                )
            return cls(host=host.strip("[]"), port=int(port))
        path = text.removeprefix("unix:")
        if not path or "\0" in path:
            raise InvalidRequest(
                "a monitor address is the path of a Unix socket or tcp:HOST:PORT; got an empty one"
                if not path
                else "a monitor's socket path can't contain a NUL byte"
            )
        if len(os.fsencode(path)) > SUN_PATH:
            raise InvalidRequest(
                f"the socket path '{path}' has {len(os.fsencode(path))} bytes, and a Unix socket's"
                f" address holds {SUN_PATH}; use a relative path or a shorter link to it"
            )
        return cls(path=path)

    async def open(self, queue_full: Callable[[], None] = lambda: None) -> socket.socket:
        """Connect a non-blocking socket (raises OSError); closed again if cancelled.

        Where others wait already to be accepted, as many as the kernel lets, `queue_full` is
        called, and it is tried until there is room: nothing tells when.
        """
        loop = asyncio.get_running_loop()
        if self.path is not None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            target: object = None
        else:
            found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            family, kind, proto, _, target = found[0]
            sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            if self.path is not None:
                await _connect_unix(sock, self.path, queue_full)
            else:
                await loop.sock_connect(sock, target)  # type: ignore[arg-type]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            sock.close()
            raise
        return sock


async def _connect_unix(sock: socket.socket, path: str, queue_full: Callable[[], None]) -> None:
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:  # which the event loop takes for a connection on its way
            queue_full()
        await asyncio.sleep(AGAIN)


def is_socket(path: str) -> bool:
    """Whether there is a socket of that name."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def peer_pid(sock: socket.socket) -> int | None:
    """The process behind a Unix socket (``SO_PEERCRED``), where the system tells."""
    if sock.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return None
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(pid) or None
