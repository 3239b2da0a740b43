"""A monitor that greets and hangs up, says what no QEMU says, or may not be reached."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp.error import ProtocolError

import qmpcommit as qc
from qmpcommit.qmp import monitor as monitor_module
from qmpcommit.qmp.address import Address
from qmpcommit.qmp.client import Client, Tap, dispose
from qmpcommit.qmp.monitor import NODES, Monitor
from qmpcommit.qmp.queries import _ENTRIES
from tests.ground.fake_monitor import Refusal, fake_monitor


async def test_a_monitor_alone_is_closed_when_it_is_left(folder: Path) -> None:
    async with fake_monitor(folder) as fake:
        async with Monitor(fake.path) as vm:
            assert await vm.execute("query-status") == {}
        await fake.all_closed()
        with pytest.raises(qc.MonitorLost, match="was closed"):
            await vm.open()


async def test_one_that_greets_and_hangs_up_is_told_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost(Client):
        async def connect(self, address: Any, ssl: Any = None) -> None:
            await super().connect(address, ssl)
            await self.disconnect()

    monkeypatch.setattr(monitor_module, "new_client", lambda name, tap: Lost(name))
    async with fake_monitor(folder) as fake:
        with pytest.raises(qc.ConnectError, match="it greeted, and hung up"):
            await qc.Session.connect(fake.path)
        await fake.all_closed()


async def test_the_next_socket_of_one_that_was_lost_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the number of the one before, by which the loop knows what it reads."""

    class Lost(Client):
        async def connect(self, address: Any, ssl: Any = None) -> None:
            await super().connect(address, ssl)
            self._schedule_disconnect()  # as its reader does

    heard: list[asyncio.Task[bytes]] = []

    async def another_comes(client: Lost, sock: socket.socket) -> None:
        await asyncio.sleep(0)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        heard.append(asyncio.create_task(read(ours, theirs)))
        await asyncio.sleep(0)
        await dispose(client, sock)
        theirs.send(b"x")

    async def read(ours: socket.socket, theirs: socket.socket) -> bytes:
        with ours, theirs:
            return await asyncio.get_running_loop().sock_recv(ours, 1)

    monkeypatch.setattr(monitor_module, "new_client", lambda name, tap: Lost(name))
    monkeypatch.setattr(monitor_module, "dispose", another_comes)
    async with fake_monitor(folder) as fake:
        with pytest.raises(qc.ConnectError, match="it greeted, and hung up"):
            await qc.Session.connect(fake.path)
        async with asyncio.timeout(5):
            assert await heard[0] == b"x"


@pytest.mark.parametrize("error", [ProtocolError("no dictionary"), ValueError("no JSON")])
async def test_an_error_that_the_protocol_leaves_to_us_is_ours(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its reader raises while a connection that failed is cleared away, it passes on."""

    class Confused(Client):
        async def connect(self, address: socket.socket | Any, ssl: Any = None) -> None:
            raise error

    def confused(name: str, tap: Tap) -> Client:
        return Confused(name)

    monkeypatch.setattr(monitor_module, "new_client", confused)
    async with fake_monitor(folder) as fake:
        with pytest.raises(qc.ConnectError, match=f"not a QMP monitor: {error}"):
            await qc.Session.connect(fake.path)


async def test_a_socket_of_another_user_is_told_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def denied(self: Address, queue_full: object) -> socket.socket:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Address, "open", denied)
    with pytest.raises(qc.ConnectError, match="run this as the user that runs QEMU"):
        await qc.Session.connect(folder / "qmp")


async def test_an_event_without_a_name_is_nobodys(folder: Path) -> None:
    async with fake_monitor(folder) as fake, qc.Session.connect(fake.path) as vm:
        with vm.events() as heard:
            fake.send(b'{"event": 5, "data": {}}\n')
            fake.event("STOP")
            async with asyncio.timeout(20):
                assert (await anext(heard)).name == "STOP"


async def test_a_monitor_without_jobs_is_asked_for_its_nodes(folder: Path) -> None:
    async def old(command: str, arguments: dict[str, Any]) -> Any:
        if command == "query-jobs":
            raise Refusal("The command query-jobs has not been found", "CommandNotFound")
        return []

    async with fake_monitor(folder, old) as fake, qc.Session.connect(fake.path) as vm:
        assert await vm.execute(NODES) == []
        assert [command for command, _ in fake.commands] == ["query-jobs", NODES]


async def test_an_answer_that_should_be_a_list_is_no_qemus(folder: Path) -> None:
    async with fake_monitor(folder) as fake, qc.Session.connect(fake.path) as vm:
        with pytest.raises(qc.ProtocolViolation, match="query-block"):
            await vm.query_block()


NO_LISTS: list[object] = [None, {}, "x", ["x"], [[]]]
NO_OBJECTS: list[object] = [None, [], "running", 5]


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        *[(command, reply) for command in _ENTRIES for reply in NO_LISTS],
        *[(command, [{name: 5}]) for command, name in _ENTRIES.items() if name],
        *[("query-status", reply) for reply in NO_OBJECTS],
    ],
)
async def test_what_is_read_as_it_comes_has_qemus_form(
    command: str, reply: object, folder: Path
) -> None:
    async def nonsense(asked: str, arguments: dict[str, Any]) -> Any:
        return reply if asked == command else []

    async with fake_monitor(folder, nonsense) as fake, qc.Session.connect(fake.path) as vm:
        with pytest.raises(qc.ProtocolViolation, match=f"answered to {command} is not") as error:
            await vm.execute(command)
        assert (error.value.vm, error.value.command) == (vm.name, command)
