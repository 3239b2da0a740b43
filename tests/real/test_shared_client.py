"""A client that its owner has connected, and connects again; a QEMU that is another one by then."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from qemu.qmp import QMPClient, Runstate

import qmpcommit as qc
from qmpcommit.qmp.client import client_pid
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import storage_daemon
from tests.ground.proxy import proxy
from tests.ground.sessions import hurried


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[QMPClient]:
    client = QMPClient("web1")
    await client.connect(path)
    try:
        yield client
    finally:
        with suppress(EOFError, OSError):
            await client.disconnect()


def through_numbers(client: QMPClient) -> Any:
    """The same over a loop like uvloop, of whose sockets one learns little but the number."""
    writer: Any = client._writer
    sock = SimpleNamespace(fileno=writer.get_extra_info("socket").fileno)
    return SimpleNamespace(_writer=SimpleNamespace(get_extra_info=lambda name: sock))


async def test_a_loss_that_nobody_hears_of_is_seen_by_the_next_command(folder: Path) -> None:
    async with (
        storage_daemon(folder, make_chain(folder)) as qemu,
        proxy(folder, qemu.qmp) as between,
        connected(between.path) as client,
        qc.Session.over(client) as vm,
    ):
        assert await vm.execute("query-jobs") == []
        await between.cut()
        async with asyncio.timeout(20):
            while vm._watchers:
                await asyncio.sleep(0)
        with pytest.raises(qc.ConnectError, match="is not connected; connect it first"):
            await vm.execute("query-jobs")
        with suppress(EOFError, OSError):
            await client.disconnect()
        await client.connect(between.path)
        assert await vm.execute("query-jobs") == []
        lost = asyncio.Event()
        vm.subscribers.add(lambda message: None, lambda up: lost.set())
        await between.cut()
        async with asyncio.timeout(20):
            await lost.wait()


async def test_a_qemu_that_hangs_is_waited_for_over_a_connection_that_is_not_ours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with connected(qemu.qmp) as client:
            async with qc.Session.over(client) as vm:
                silent = asyncio.Event()
                drop = vm.drop

                def noticed() -> None:
                    drop()
                    silent.set()

                monkeypatch.setattr(vm, "drop", noticed)
                job = await vm.commit("top", policy=qc.Hold())
                await job.ready()
                with hurried(vm):
                    qemu.stop()
                    job.pivot()
                    async with asyncio.timeout(20):
                        await silent.wait()
                assert client.runstate is Runstate.RUNNING
                qemu.cont()
                assert (await job.wait()).action == "pivot"
            assert client.runstate is Runstate.RUNNING
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_another_qemu_can_do_is_asked_anew(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        vm = await qc.Session.connect(qemu.qmp)
        before = await vm.features()
        assert await vm.features() is before
    async with storage_daemon(folder, chain) as qemu:
        assert await vm.restore() is False, "another process answers"
        assert await vm.features() is not before
        await vm.close()


@pytest.mark.parametrize("told", [False, True], ids=["seen", "told"])
async def test_stale_files_are_deleted_over_a_client_that_is_not_ours(
    told: bool, folder: Path
) -> None:
    """Behind a proxy the socket tells of another process, so that it has to be told."""
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        pid = qemu.pid if told else None
        async with connected(between.path if told else qemu.qmp) as client:
            async with qc.Session.over(client, pid=pid) as vm:
                job = await vm.commit("export0", policy=qc.Pivot(), delete=True)
                outcome = await job.wait()
                assert outcome.deleted == [str(chain.top)], outcome.warnings
                assert vm.peer_pid == qemu.pid
            assert client.runstate is Runstate.RUNNING
        assert not chain.top.exists()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_process_that_was_told_of_is_believed_as_long_as_it_lives(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with connected(between.path) as client:
            with pytest.raises(qc.InvalidRequest, match="whole number, not True"):
                qc.Session.over(client, pid=True)
            other = await asyncio.create_subprocess_exec("sleep", "100")
            async with qc.Session.over(client, pid=other.pid) as vm:
                assert vm.peer_pid == other.pid
                other.kill()
                await other.wait()
                vm._see_peer(client)
                assert vm.peer_pid != other.pid
        await qemu.quit()


async def test_a_client_that_is_not_ours_tells_of_qemus_end_as_a_connection_of_ours_does(
    folder: Path,
) -> None:
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain) as qemu,
        connected(qemu.qmp) as client,
        qc.Session.over(client) as vm,
    ):
        assert vm.cwd == os.readlink(f"/proc/{qemu.pid}/cwd")
        assert client_pid(through_numbers(client)) == qemu.pid
        plan = await vm.plan("export0", policy=qc.Keep())
        unchecked = [f for f in plan.findings if "not known to run on this host" in f.message]
        assert not unchecked, unchecked
        job = await vm.commit("export0", policy=qc.Hold())
        await job.ready()
        qemu.kill()
        await qemu.ended()
        with pytest.raises(qc.VMGone, match=f"process {qemu.pid} is gone"):
            await vm.execute("query-jobs")
        with pytest.raises(qc.VMGone):
            await job.wait()


async def test_what_a_session_lacks_that_knows_no_process_is_logged_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The proxy is this very process, as a socket's peer is that listened for QEMU."""
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain) as qemu,
        proxy(folder, qemu.qmp) as between,
        connected(between.path) as client,
        qc.Session.over(client, name="web1") as vm,
    ):
        assert (vm.peer_pid, vm.cwd) == (None, None)
        plan = await vm.plan("export0", policy=qc.Keep())
        assert any("not known to run on this host" in each.message for each in plan.findings)
        vm._see_peer(client)
    told = [each.getMessage() for each in caplog.records if each.name == "qmpcommit"]
    told = [each for each in told if "qemu_process_unknown" in each]
    assert len(told) == 1, told
    assert "no file is deleted" in told[0]
