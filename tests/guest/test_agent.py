"""Freezing a real guest's file systems through a real ``qemu-ga``; it always goes on."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.qmp.agent import Agent
from tests.ground.images import create
from tests.guest.guest import (
    Guest,
    assert_files,
    file_system,
    guest,
    journal_is_empty,
    needs_guest,
)

pytestmark = needs_guest


async def writes_while_it_spins(made: Guest) -> int:
    """How many writes the guest acknowledges while its CPU does the work of 20."""
    await made.spin()  # what was under way has been said
    before = made.count
    await made.spin()
    return made.count - before


async def snapshot(vm: qc.Session, path: Path, chain_top: Path) -> None:
    create(path, None, backing=chain_top)
    node = {"driver": "file", "filename": str(path)}
    await vm.execute("blockdev-add", driver="qcow2", node_name=path.stem, backing=None, file=node)
    active = (await vm.disk("vda")).chain[0].node_name
    await vm.execute("blockdev-snapshot", node=active, overlay=path.stem)


async def test_nothing_is_written_while_frozen_and_what_is_snapshot_then_needs_no_journal(
    folder: Path,
) -> None:
    chain = file_system(folder)
    async with guest(folder, chain) as made, qc.Session.connect(made.qemu.qmp) as vm:
        made.order("agent")
        assert await writes_while_it_spins(made) > 0
        over = folder / "over.qcow2"
        async with qc.freeze(vm, "agent", agents=made.agent, limit=60) as quiet:
            assert quiet.held
            assert quiet.file_systems == 1
            assert await writes_while_it_spins(made) == 0
            frozen = Guest(made.qemu, "", made.reader, made.writer, dict(made.acked), made.count)
            await snapshot(vm, over, chain.top)
        assert quiet.seconds is not None
        await made.more()
        # The same without a freeze: what a power cut leaves, which the journal mends.
        rough = folder / "rough.qcow2"
        async with qc.freeze(vm, None):
            await snapshot(vm, rough, over)
        await made.more()
        cut = folder / "cut.qcow2"
        shutil.copyfile(over, cut)
        await (await vm.commit("vda", policy=qc.Pivot(), base=1, timeout=60)).wait()
        await made.more()
        await made.power_off()
    assert journal_is_empty(chain.top)
    assert_files(chain.top, frozen)
    assert not journal_is_empty(cut)  # the test can tell
    assert_files(over, made)


async def test_the_guest_goes_on_however_a_freeze_ends(folder: Path) -> None:
    chain = file_system(folder)
    async with guest(folder, chain) as made, qc.Session.connect(made.qemu.qmp) as vm:
        made.order("agent")
        agent: dict[str, Any] = {"agents": made.agent, "limit": 60}

        with pytest.raises(ZeroDivisionError):
            async with qc.freeze(vm, "agent", **agent):
                raise ZeroDivisionError
        await made.more()

        with pytest.raises(qc.DeadlineExceeded, match="goes on"):
            async with qc.freeze(vm, "agent", agents=made.agent, limit=2):
                await asyncio.Event().wait()
        await made.more()

        entered = asyncio.Event()

        async def work() -> None:
            async with qc.freeze(vm, "agent", **agent):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await entered.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        await made.more()

        class Cancelling:
            """Cancels right before the freeze is sent: the agent gets it, nobody hears of it."""

            async def note(self, step: str, **facts: Any) -> None:
                if step == "freeze":
                    asyncio.get_running_loop().call_soon(early.cancel)

        async def begin() -> None:
            async with qc.freeze(vm, "agent", ledger=Cancelling(), **agent):
                raise AssertionError("cancelled, and begun nevertheless")

        early = asyncio.create_task(begin())
        await asyncio.wait({early})
        assert early.cancelled()
        await made.more()
        await made.power_off()
    assert_files(chain.top, made)


async def test_what_a_killed_process_left_frozen_is_told_and_can_be_thawed(folder: Path) -> None:
    chain = file_system(folder)
    async with guest(folder, chain) as made, qc.Session.connect(made.qemu.qmp) as vm:
        made.order("agent")
        async with Agent(made.agent, vm="web1") as client:
            await client.freeze(timeout=60)
            with pytest.raises(qc.QuiesceFailed, match="refused"):
                await client.execute("guest-get-osinfo")  # not while it is frozen
        with pytest.raises(qc.QuiesceFailed, match="frozen already"):
            async with qc.freeze(vm, "agent", agents=made.agent):
                raise AssertionError("frozen twice")
        for _ in range(2):
            await qc.thaw(vm, "agent", made.agent)
            await made.more()
        await made.power_off()
    assert_files(chain.top, made)


async def test_a_guest_without_an_agent_is_told_in_seconds_and_not_touched(folder: Path) -> None:
    chain = file_system(folder)
    async with guest(folder, chain) as made, qc.Session.connect(made.qemu.qmp) as vm:
        with pytest.raises(qc.QuiesceFailed, match="no qemu-ga runs in the guest") as caught:
            async with qc.freeze(vm, "agent", agents=made.agent):
                raise AssertionError("nobody answered")
        assert caught.value.agent == made.agent
        assert caught.value.vm == vm.name
        with pytest.raises(qc.QuiesceFailed, match=r"No such file.*socket"):
            async with qc.freeze(vm, "agent", agents=f"{made.agent}-not"):
                raise AssertionError("nobody is there")
        made.order("agent")
        async with Agent(made.agent) as late:  # what was asked before is answered now, to nobody
            assert await late.status() == "thawed"
        await made.more()
        await made.power_off()
    assert_files(chain.top, made)
