"""A client of ours is disconnected in bounded time, whatever state its connection is in."""

from __future__ import annotations

import asyncio
import socket

import pytest
from qemu.qmp import QMPClient

from qmpcommit.qmp import client
from qmpcommit.qmp.client import dispose


class Stuck(QMPClient):
    """One that is never done with its end; `given_up` when it is told to stop trying."""

    given_up = False

    async def disconnect(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.given_up = True
            raise


class Flushing(QMPClient):
    """One that is done when its peer is: it still writes, and nobody reads."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._pair = sock

    async def disconnect(self) -> None:
        assert await asyncio.get_running_loop().sock_recv(self._pair, 1) == b""


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.05)


@pytest.mark.parametrize("has_socket", [True, False])
async def test_one_that_never_ends_is_given_up(has_socket: bool) -> None:
    ours, theirs = socket.socketpair()
    stuck = Stuck()
    with ours, theirs:
        async with asyncio.timeout(20):
            await dispose(stuck, ours if has_socket else None)
        theirs.setblocking(False)
        if has_socket:
            assert theirs.recv(1) == b"", "it was hung up before"
    assert stuck.given_up


async def test_one_that_can_not_flush_is_hung_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        async with asyncio.timeout(20):
            await dispose(Flushing(theirs), ours)


async def test_what_it_ended_with_is_no_news() -> None:
    class Failing(QMPClient):
        async def disconnect(self) -> None:
            raise EOFError

    await dispose(Failing(), None)
