"""What systemd says to a service and wants to hear: sockets, readiness, the watchdog.

Rests on sd_notify(3) and sd_listen_fds(3).
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

_FIRST_FD = 3


def listening() -> list[socket.socket]:
    """The sockets that systemd has opened for us; empty without socket activation."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return []
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    sockets = [socket.socket(fileno=_FIRST_FD + number) for number in range(count)]
    for sock in sockets:
        os.set_inheritable(sock.fileno(), False)
        sock.setblocking(False)
    return sockets


def notify(message: str) -> None:
    """Tell systemd, where it listens: ``READY=1``, ``STOPPING=1``, ``WATCHDOG=1``, ..."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(message.encode())


async def watch() -> None:
    """Feed the watchdog, twice as often as it asks for; returns where there is none."""
    period = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    if not period or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(period / 2)
