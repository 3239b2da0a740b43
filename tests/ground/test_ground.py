"""The ground itself: it would see a wrong byte, and it changes nothing of what it carries."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest
from qemu.qmp import ConnectError, QMPClient

from tests.ground.fake_monitor import fake_monitor
from tests.ground.images import MIB, Picture, Write, assert_disk, make_chain, write
from tests.ground.machines import listening, machine, storage_daemon
from tests.ground.nbd import Nbd, Writer
from tests.ground.proxy import REFUSAL, proxy
from tests.ground.sessions import runs


def test_a_wrong_byte_is_seen(folder: Path) -> None:
    chain = make_chain(folder, 3)
    for path, picture in zip(chain.files, chain.pictures, strict=True):
        assert_disk(path, picture)
    write(chain.base, [Write(10 * MIB + 12345, 1, 0x99)])
    with pytest.raises(AssertionError, match=r"top.qcow2 differs at 0xa03039: it has 99"):
        assert_disk(chain.top, chain.pictures[-1])


def test_a_wrong_size_is_seen(folder: Path) -> None:
    chain = make_chain(folder)
    picture = Picture(chain.pictures[-1].size + 1, chain.pictures[-1].data + b"\0")
    with pytest.raises(AssertionError, match="bytes, not"):
        assert_disk(chain.top, picture)


async def test_a_commit_by_hand_under_a_writer(folder: Path) -> None:
    """What every other test rests on: writer, proxy, picture, and QEMU's own commit."""
    chain = make_chain(folder)
    picture = chain.pictures[-1]
    async with (
        asyncio.timeout(30),
        storage_daemon(folder, chain) as daemon,
        proxy(folder, daemon.qmp) as between,
    ):
        client = QMPClient()
        await client.connect(between.path)
        async with (
            await Nbd.connect(daemon.nbd, "top") as nbd,
            Writer(nbd, picture) as writer,
        ):
            await writer.writes(50)
            with client.listener(("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED")) as events:
                await client.execute("block-commit", {"job-id": "j", "device": "top"})
                await events.get()
                await writer.writes(50)
                await client.execute("job-complete", {"id": "j"})
                await events.get()
            await writer.writes(50)
        assert between.sent == ["qmp_capabilities", "block-commit", "job-complete"]
        await client.disconnect()
        await daemon.quit()
    assert_disk(chain.base, picture)


async def test_a_request_to_a_server_that_is_gone_fails(folder: Path) -> None:
    chain = make_chain(folder)
    async with asyncio.timeout(30), storage_daemon(folder, chain) as daemon:
        nbd = await Nbd.connect(daemon.nbd, "top")
        daemon.stop()
        under_way = asyncio.create_task(nbd.read(0, 512))
        await asyncio.sleep(0)
        daemon.kill()
        with pytest.raises(ConnectionError):
            await under_way
        await daemon.ended()
        for request in (nbd.read(0, 512), nbd.write(0, bytes(512)), nbd.flush()):
            with pytest.raises(ConnectionError):
                await request
        await nbd.close()


def test_a_socket_that_is_bound_does_not_listen_yet(folder: Path) -> None:
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        assert not listening([path])
        sock.listen()
        assert listening([path])


async def test_a_machine_stops_goes_on_and_is_killed(folder: Path) -> None:
    chain = make_chain(folder)
    async with asyncio.timeout(60), machine(folder, chain, running=True) as vm:
        assert await runs(vm)
        vm.stop()
        asking = asyncio.create_task(vm.execute("query-status"))
        done, _ = await asyncio.wait({asking}, timeout=0.2)
        assert not done
        vm.cont()
        assert (await asking)["running"]
        vm.kill()
        await vm.ended()


async def test_a_machine_waits_for_cont_unless_told_otherwise(folder: Path) -> None:
    chain = make_chain(folder)
    async with asyncio.timeout(60), machine(folder, chain) as vm:
        assert (await vm.execute("query-status"))["status"] == "prelaunch"
        await vm.quit()


async def test_the_proxy_does_to_a_message_what_it_is_told(folder: Path) -> None:
    chain = make_chain(folder)
    fates: dict[str, str] = {}
    async with (
        asyncio.timeout(30),
        storage_daemon(folder, chain) as daemon,
        proxy(folder, daemon.qmp) as between,
    ):
        between.to_qemu = lambda message: fates.get(message["execute"], "pass")
        reader, writer = await asyncio.open_unix_connection(between.path)

        async def told() -> dict[str, object]:
            message: dict[str, object] = json.loads(await reader.readline())
            return message

        def send(command: str) -> None:
            writer.write(json.dumps({"execute": command, "id": command}).encode())

        assert "QMP" in await told()
        fates["query-jobs"] = "refuse"
        fates["qmp_capabilities"] = "split"
        send("qmp_capabilities")
        assert await told() == {"return": {}, "id": "qmp_capabilities"}
        send("query-jobs")
        error = {"class": "GenericError", "desc": REFUSAL}
        assert await told() == {"id": "query-jobs", "error": error}
        fates["query-jobs"] = "hold"
        send("query-jobs")
        send("query-block-jobs")
        await between.held.wait()
        assert between.sent[-1] == "query-jobs"  # what comes after it waits too
        between.release()
        assert (await told(), await told()) == (
            {"return": [], "id": "query-jobs"},
            {"return": [], "id": "query-block-jobs"},
        )
        fates["query-jobs"] = "drop"
        fates["query-block-jobs"] = "twice"
        send("query-jobs")
        send("query-block-jobs")
        assert (await told())["id"] == (await told())["id"] == "query-block-jobs"
        between.to_client = lambda message: "split"
        fates.clear()
        send("query-jobs")
        assert await told() == {"return": [], "id": "query-jobs"}
        fates["query-jobs"] = "cut"
        send("query-jobs")
        with pytest.raises(ValueError, match="Expecting value"):
            await told()
        writer.close()
        await daemon.quit()


async def test_what_a_hook_raises_fails_the_test(folder: Path) -> None:
    chain = make_chain(folder)

    async def talk(target: str) -> None:
        async with proxy(folder, target) as between:
            between.to_client = lambda message: "nonsense"
            reader, writer = await asyncio.open_unix_connection(between.path)
            assert not await reader.read()
            writer.close()

    async with asyncio.timeout(30), storage_daemon(folder, chain) as daemon:
        with pytest.raises(AssertionError, match="no such fate"):
            await talk(daemon.qmp)
        await daemon.quit()


async def test_a_fake_monitor_answers_what_is_no_command(folder: Path) -> None:
    async with asyncio.timeout(30), fake_monitor(folder) as fake:
        reader, writer = await asyncio.open_unix_connection(fake.path)
        await reader.readline()
        writer.write(b'{"id": 1}')
        assert "lacks member" in json.loads(await reader.readline())["error"]["desc"]
        writer.write(b"[1]")
        assert not await reader.read()
        writer.close()


async def test_a_fake_monitor_hangs_up_at_once(folder: Path) -> None:
    async with asyncio.timeout(30), fake_monitor(folder, hangs_up=True) as fake:
        with pytest.raises(ConnectError):
            await QMPClient().connect(fake.path)
        assert fake.connections == 1
