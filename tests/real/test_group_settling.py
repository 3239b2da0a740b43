"""A group is settled where its VMs come and go: over losses, and with its guests first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.ledger import read_ledger
from qmpcommit.group.book import GroupBook
from qmpcommit.group.members import GroupMember
from qmpcommit.group.noted import Way
from qmpcommit.group.outcome import is_clean
from qmpcommit.group.settling import Settling
from qmpcommit.qmp.process import process_identity
from tests.ground.images import assert_disk
from tests.ground.sessions import runs
from tests.real.test_group_ledger import Two, two_of

pytestmark = pytest.mark.timeout(300)


class Here(Settling):
    """On sessions, of which those in `away` can't be reached before they were waited for."""

    called = "test"
    book: GroupBook

    def __init__(self, ledger: qc.FileLedger, noted: dict[str, Any], vms: list[qc.Session]) -> None:
        self.vms = dict(zip(noted["vms"], vms, strict=True))
        group = noted["known_as"]
        book = GroupBook(ledger, [GroupMember(vm, "vda") for vm in vms], group)
        book.goes_on_from(noted, {vm: key for key, vm in self.vms.items()})
        super().__init__(group, book, vms[0].log, noted["freeze"], {})
        self.away, self.waited = set[str](), list[int]()
        self.come = asyncio.Event()
        self.gone = False

    async def _jobs(self, key: str) -> tuple[str, list[dict[str, Any]]] | None:
        if key in self.away:
            return None
        return process_identity(self.vms[key].peer_pid), await self.vms[key].execute("query-jobs")

    @asynccontextmanager
    async def _reach(self, key: str) -> AsyncIterator[qc.Session]:
        if key in self.away:
            raise qc.MonitorLost(f"{key} is away")
        yield self.vms[key]

    async def _back(self, number: int, error: qc.QmpCommitError) -> None:
        self.waited.append(number)
        if self.gone:
            raise qc.VMGone("it does not come back")
        await self.come.wait()
        self.away.clear()

    def _hooks(self, number: int) -> dict[str, Any]:
        return {}

    async def holds(self, number: int) -> bool:
        """Whether this member's job holds its disk."""
        vm = list(self.vms.values())[number]
        return "pending" in [job["status"] for job in await vm.execute("query-jobs")]

    async def let_go(self, number: int) -> None:
        """Wait until it does not."""
        async with asyncio.timeout(30):
            while await self.holds(number):
                await asyncio.sleep(0.01)

    async def waits(self, *numbers: int) -> None:
        """Wait until these are waited for."""
        async with asyncio.timeout(30):
            while not {*numbers} <= {*self.waited}:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def killed(
    folder: Path, kind: str, freeze: str | None = None, **noted: Any
) -> AsyncIterator[tuple[Two, Here]]:
    """Both disks are held, and that they are to be finalized is noted, when the process dies."""
    async with two_of(folder, kind, freeze) as two:
        _, places, _ = await two.run(0, meanwhile=[two.qemus[1].qmp2])
        assert places[-1] == "after note finalize"
        async with AsyncExitStack() as stack:
            vms = [
                await stack.enter_async_context(qc.Session.connect(qemu.qmp)) for qemu in two.qemus
            ]
            ledger = qc.FileLedger(two.ledger)
            yield two, Here(ledger, {**await read_ledger(ledger), **noted}, vms)


async def ends_as(two: Two, files: list[Path]) -> None:
    for qemu in two.qemus:
        assert await qemu.execute("query-jobs") == []
        await qemu.quit()
    for file, chain in zip(files, two.chains, strict=True):
        assert_disk(file, chain.pictures[-1])


async def test_each_goes_on_as_soon_as_its_vm_is_there(folder: Path) -> None:
    async with killed(folder, "pivot", "pause") as (two, here):
        (first, one), (second, other) = here.vms.items()
        assert [await runs(one), await runs(other)] == [False, False]
        here.away.add(second)
        await here.relieve(first, one)
        assert [await runs(one), await runs(other)] == [True, False]
        await here.let_go(0)
        assert await here.holds(1)
        way = await here.way()
        assert way is Way.FINALIZE
        settling = asyncio.create_task(here.settle(way))
        await here.waits(1)
        here.come.set()
        end = here.end_of(way, await settling, "")
        assert isinstance(end, qc.GroupOutcome), end
        assert (end.action, end.decided_by, here.problems) == ("pivot", "policy", [])
        assert set(here.waited) == {1}
        assert all(each.quiesced is not None and each.quiesced > 0 for each in end.outcomes)
        assert [await runs(one), await runs(other)] == [True, True]
        await ends_as(two, [chain.base for chain in two.chains])


async def test_what_nobody_has_decided_is_cancelled_where_it_is_held(folder: Path) -> None:
    async with killed(folder, "keep", finalize=False) as (two, here):
        key, vm = next(iter(here.vms.items()))
        await here.relieve(key, vm)
        await here.let_go(0)
        assert await here.holds(1)
        way = await here.way()
        assert way is Way.CANCEL
        ends = await here.settle(way)
        assert all(is_clean(end) for end in ends)
        error = here.end_of(way, ends, "")
        assert isinstance(error, qc.GroupFailed), error
        assert "the test that held its disks ended before all were decided" in error.message
        wanted = here.end_of(way, ends, "caller")
        assert isinstance(wanted, qc.GroupOutcome)
        assert (wanted.action, wanted.decided_by) == ("abort", "caller")
        await ends_as(two, [chain.top for chain in two.chains])


async def test_whoever_stops_in_the_middle_leaves_no_guest_paused(folder: Path) -> None:
    """And the jobs as they are, for the next one."""
    async with killed(folder, "recycle") as (two, here):
        here.away |= {*here.vms}
        settling = asyncio.create_task(here.settle(Way.FINALIZE))
        await here.waits(0, 1)
        assert [await runs(vm) for vm in here.vms.values()] == [False, False]
        here.away.clear()
        settling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await settling
        assert [await runs(vm) for vm in here.vms.values()] == [True, True]
        assert [await here.holds(0), await here.holds(1)] == [True, True]
        outcome = await qc.resume(qc.FileLedger(two.ledger), list(here.vms.values()))
        assert isinstance(outcome, qc.GroupOutcome)
        assert outcome.action == "recycle"
        await ends_as(two, [chain.top.parent / "new" for chain in two.chains])


async def test_one_that_does_not_come_back_is_told(folder: Path) -> None:
    """Nor does its guest, which is no problem."""
    async with killed(folder, "keep", "pause") as (two, here):
        (_, one), (second, other) = here.vms.items()
        here.away.add(second)
        here.gone = True
        ends = await here.settle(await here.way())
        error = here.end_of(Way.FINALIZE, ends, "")
        assert isinstance(error, qc.GroupSplit), error
        sides = [[f"vda of {vm.name}"] for vm in (one, other)]
        assert [error.facts[side] for side in ("kept", "unknown")] == sides
        assert await runs(one)
        assert (here.book.frozen, here.problems) == ({}, [])
        here.away.clear()
        here.gone = False
        await here.settle(Way.FINALIZE)
        await ends_as(two, [chain.top for chain in two.chains])
