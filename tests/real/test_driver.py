"""What a commit does where QEMU refuses an answer, its line breaks, or others are at its job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit import driver as driver_module
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.phases import State
from qmpcommit.commit.request import Request
from qmpcommit.commit.stale_layers import Around
from tests.ground.images import assert_disk, make_chain, two_chains
from tests.ground.machines import machine, storage_daemon
from tests.ground.proxy import Proxy, Strike, let_pass, proxy
from tests.ground.sessions import files, lost, time_to_go_too_far
from tests.real.test_job import Door, held_by, nothing_runs

Message = dict[str, Any]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks again at once."""
    monkeypatch.setattr(driver_module, "RETRY", 0.01)


async def test_what_qemu_refuses_to_tell_is_asked_again(folder: Path, hurried: None) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            job = await vm.commit("top", policy=qc.Hold())
            await job.ready()
            between.to_qemu = Strike("query-jobs", "refuse", times=3)
            await job.pivot()
            assert (await job.wait()).action == "pivot"
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_it_never_tells_is_the_error_in_its_own_words(
    folder: Path, hurried: None
) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            job = await vm.commit("top", policy=qc.Hold())
            await job.ready()
            between.to_qemu = Strike("query-jobs", "refuse")
            await job.pivot()
            with pytest.raises(qc.CommandRefused, match="QEMU refused query-jobs"):
                await job.wait()
        await qemu.execute("job-dismiss", id=job.id)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_monitor_that_breaks_whenever_it_is_asked_is_lost(folder: Path) -> None:
    """It comes back each time, and would for ever."""
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path, patience=0.5) as vm:
            job = await vm.commit("top", policy=qc.Hold())
            await job.ready()
            before = len(between.sent)
            between.to_qemu = Strike("query-jobs", "cut")
            await between.cut()
            with pytest.raises(qc.MonitorLost, match="broke each time before it answered") as lost:
                await job.wait()
            assert "may be running in QEMU still" in str(lost.value)
            assert 0 < between.sent[before:].count("qmp_capabilities") < 15
            between.to_qemu = let_pass
            await (await vm.adopt(job.id, policy=qc.Pivot())).wait()
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_line_that_breaks_while_the_guest_is_paused_undoes_the_recycle(
    folder: Path,
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            between.to_qemu = Strike("stop", "cut after", times=1)
            job = await vm.commit("vda", policy=qc.Recycle(str(fresh)))
            with pytest.raises(qc.CommitFailed, match="the monitor was lost meanwhile"):
                await job.wait()
            assert (await vm.query_status()).running
            await nothing_runs(vm)
            nodes = (await vm.graph()).nodes
            assert not [name for name in nodes if name.startswith("qmpcommit-")]
        await qemu.quit()
    assert not fresh.exists()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_commit_is_taken_up_while_its_monitor_is_away(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            before = await vm.commit("top", policy=qc.Hold())
            await before.ready()
            await before.detach()
            await between.refuse()
            await lost(vm)
            job = await vm.resume(before.plan, Resumed(before.state))
            await between.open()
            async with asyncio.timeout(20):
                await job.ready()
                await job.pivot()
            assert (await job.wait()).action == "pivot"
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_is_sent_first_brings_the_monitor_back(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            job = await vm.prepare(Request("top", qc.Pivot()), Around())
            await between.refuse()
            await lost(vm)
            await between.open()
            assert (await (await vm.launch(job)).wait()).action == "pivot"
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_commit_is_not_looked_for_in_a_qemu_that_has_come_instead(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        vm = await qc.Session.connect(qemu.qmp)
        before = await vm.commit("top", policy=qc.Hold())
        await before.ready()
        await before.detach()
    await lost(vm)
    async with storage_daemon(folder, chain):
        job = await vm.resume(before.plan, Resumed(before.state))
        with pytest.raises(qc.VMGone, match="Nothing was pivoted"):
            await job.wait()
        await nothing_runs(vm)
        await vm.close()
    assert_disk(chain.top, chain.pictures[-1])


class Slow:
    """A ledger that takes its time over the pivot."""

    def __init__(self) -> None:
        self.asked, self.done = asyncio.Event(), asyncio.Event()

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        if step == "job-complete":
            self.asked.set()
            await self.done.wait()

    def moved(self, state: State) -> None:
        pass


async def test_a_qemu_that_has_come_instead_is_known_although_somebody_else_met_it_first(
    folder: Path,
) -> None:
    chain, ledger = make_chain(folder), Slow()
    async with storage_daemon(folder, chain) as qemu:
        vm = await qc.Session.connect(qemu.qmp)
        job = await vm.commit("top", policy=qc.Pivot(), ledger=ledger)
        await ledger.asked.wait()
    async with storage_daemon(folder, chain):
        await nothing_runs(vm)  # which brings the line back
        ledger.done.set()
        with pytest.raises(qc.VMGone, match="whether it happened is unknown"):
            await job.wait()
        await vm.close()
    assert_disk(chain.top, chain.pictures[-1])


async def test_others_are_met_anew_where_the_line_broke_while_the_disk_was_held(
    folder: Path,
) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            door = Door()
            job = await held_by(vm, door, qc.Pivot())
            await door.held.wait()
            door.held.clear()
            await between.cut()
            async with asyncio.timeout(20):
                await door.held.wait()
            assert door.met == 2
            door.open.set()
            assert (await job.wait()).action == "pivot"
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_follows_the_end_waits_at_the_gate(folder: Path) -> None:
    """The disk is pivoted, and nobody's guest waits for what is left."""
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            vm.gate = asyncio.Semaphore(1)
            await vm.gate.acquire()
            with vm.events("BLOCK_JOB_COMPLETED") as ended:
                job = await vm.commit("top", policy=qc.Pivot(), delete=True)
                await anext(ended)
            await time_to_go_too_far(qemu)
            assert not job.done
            assert chain.top.exists()
            vm.gate.release()
            assert (await job.wait()).deleted == [str(chain.top)]
            assert not vm.gate.locked()
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


# -- a job whose storage may make it wait, asked for among others ---------------------------------


async def room(stall: qc.Stall) -> None:
    raise AssertionError("there is room")


async def test_it_is_found_among_the_jobs_of_other_disks(folder: Path) -> None:
    chains = two_chains(folder)
    async with machine(folder, *chains) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            stalling: Any = {"policy": qc.Hold(), "on_error": "stop", "on_stall": room}
            jobs = [await vm.commit(disk, **stalling) for disk in ("vda", "vdb")]
            for job in jobs:  # QEMU lists one of them first
                await job.ready()
                await job.pivot()
                assert (await job.wait()).action == "pivot"
            await nothing_runs(vm)
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.base, chain.pictures[-1])


class Late:
    """What QEMU says of a job that has concluded comes late; meanwhile others are at it."""

    def __init__(self, between: Proxy) -> None:
        self.concluded = asyncio.Event()
        self._between = between
        between.to_client = self._hold

    def _hold(self, message: Message) -> str:
        if message.get("data", {}).get("status") != "concluded" or self.concluded.is_set():
            return "pass"
        self.concluded.set()
        return "hold"

    @asynccontextmanager
    async def meanwhile(self, qmp: str) -> AsyncIterator[qc.Session]:
        """Another client, and then what was held goes on."""
        async with asyncio.timeout(20):
            await self.concluded.wait()
        async with qc.Session.connect(qmp) as other:
            yield other
        self._between.release()


async def test_its_end_is_known_although_another_has_dismissed_it(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            late = Late(between)
            job = await vm.commit("top", policy=qc.Pivot(), on_error="stop", on_stall=room)
            async with late.meanwhile(qemu.qmp2) as other:
                await other.execute("job-dismiss", id=job.id)
            assert (await job.wait()).action == "pivot"
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_layer_is_merged_although_another_client_merges_its_base_too(folder: Path) -> None:
    """The chain is shorter by two when it can be looked at."""
    chain = make_chain(folder, 4)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            late = Late(between)
            job = await vm.commit("vda", top="low", base="mid")
            async with late.meanwhile(qemu.qmp2) as other:
                await other.execute("job-dismiss", id=job.id)
                with other.events("BLOCK_JOB_COMPLETED") as ended:
                    await other.execute("block-commit", job_id="theirs", device="top",
                                        top_node="mid", base_node="base")  # fmt: skip
                    await anext(ended)
            outcome = await job.wait()
            assert (outcome.status, outcome.action) == ("completed", "none")
            assert await files(vm) == [chain.top, chain.base]
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[-2])
