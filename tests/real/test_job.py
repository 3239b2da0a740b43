"""A commit under way and its caller: decisions, deadlines, hooks, and whoever lets it go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit import converge as converge_module
from qmpcommit.commit import job as job_module
from qmpcommit.commit.converge import ConvergeReport
from qmpcommit.commit.phases import Phase
from qmpcommit.commit.request import Request
from qmpcommit.commit.stale_layers import Around, Barrier
from tests.ground.images import MIB, Write, assert_disk, make_chain, write
from tests.ground.machines import machine, storage_daemon
from tests.ground.proxy import let_pass, proxy
from tests.ground.sessions import files, time_to_go_too_far


class Door:
    """A barrier: `held` is set when the disk waits before it, which it does until `open` is."""

    def __init__(self) -> None:
        self.held, self.open = asyncio.Event(), asyncio.Event()
        self.met = 0

    async def __call__(self) -> str | None:
        self.met += 1
        self.held.set()
        await self.open.wait()
        return None


async def held_by(vm: qc.Session, door: Barrier, policy: Any) -> qc.CommitJob:
    """A commit of a group's kind, whose disk is held when it is decided."""
    return await vm.launch(await vm.prepare(Request("top", policy), Around(barrier=door)))


async def until_decided(job: qc.CommitJob) -> None:
    async with asyncio.timeout(20):
        while job.phase is Phase.READY:
            await asyncio.sleep(0)


async def nothing_runs(vm: qc.Session) -> None:
    assert await vm.execute("query-jobs") == []


# -- decisions ------------------------------------------------------------------------------------


async def test_what_is_decided_or_over_can_not_be_decided_otherwise(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            door = Door()
            job = await held_by(vm, door, qc.Hold())
            await job.ready()
            pivoted = job.pivot()
            await until_decided(job)
            with pytest.raises(qc.JobConflict, match="is decided already: pivot"):
                job.keep()
            again = job.pivot()
            door.open.set()
            async with asyncio.TaskGroup() as group:
                group.create_task(pivoted)
                group.create_task(again)
            await again
            assert (await job.wait()).action == "pivot"
            with pytest.raises(qc.JobConflict, match="has ended already; its outcome tells how"):
                job.keep()
            await job.pivot()  # as it has ended
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_its_caller_may_decide_for_a_fresh_overlay(folder: Path) -> None:
    chain, fresh = make_chain(folder, bulk=33 * MIB), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("vda", policy=qc.Hold(), bandwidth="1MiB")
            with pytest.raises(qc.NotReady, match="recycle again when it is READY"):
                job.recycle(folder / "too-early.qcow2")
            await job.set_bandwidth(0)
            await job.ready()
            await job.recycle(fresh)
            outcome = await job.wait()
            assert (outcome.action, outcome.decided_by) == ("recycle", "caller")
            assert await files(vm) == [fresh, chain.base]
            assert (await vm.query_status()).running
        await qemu.quit()
    assert not (folder / "too-early.qcow2").exists()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(fresh, chain.pictures[-1])


async def test_nothing_is_to_be_decided_for_a_layer_below_the_active_one(folder: Path) -> None:
    chain = make_chain(folder, 3)
    write(chain.files[1], [Write(44 * MIB, 18 * MIB, 0x77)])
    chain.pictures[-1].fill(44 * MIB, 18 * MIB, 0x77)
    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("vda", top=1, bandwidth="1MiB")
            with pytest.raises(
                qc.NotReady, match=r"no second phase, and nothing to keep\. It goes"
            ):
                job.keep()
            await job.cancel()
            assert (await job.wait()).action == "abort"
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("failure", [ZeroDivisionError, asyncio.CancelledError])
async def test_a_policy_that_fails_after_its_caller_has_decided_is_no_news(
    failure: type[BaseException], folder: Path
) -> None:
    chain = make_chain(folder)
    jobs: list[qc.CommitJob] = []
    launched = asyncio.Event()

    async def late(ready: qc.Ready) -> qc.Pivot:
        await launched.wait()
        jobs[0].keep()
        await until_decided(jobs[0])
        raise failure

    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            door = Door()
            jobs.append(await held_by(vm, door, late))
            launched.set()
            async with asyncio.timeout(20):
                await door.held.wait()
            door.open.set()
            outcome = await jobs[0].wait()
            assert (outcome.action, outcome.decided_by) == ("keep", "caller")
            await nothing_runs(vm)
        await qemu.quit()
    for path in (chain.base, chain.top):
        assert_disk(path, chain.pictures[-1])


# -- before it begins, and when it is let go ------------------------------------------------------


async def test_one_that_was_never_sent_has_nothing_to_end(folder: Path) -> None:
    async with (
        storage_daemon(folder, make_chain(folder)) as qemu,
        qc.Session.connect(qemu.qmp) as vm,
    ):
        job = await vm.prepare(Request("top", qc.Pivot()), Around())
        job.timeout = 5.0
        assert job.timeout == 5.0
        await job.abandon()
        await job.detach()
        assert (job.outcome, job.error) == (None, None)
        await nothing_runs(vm)


async def test_whoever_leaves_a_job_can_wait_until_no_disk_is_held(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            door = Door()
            job = await held_by(vm, door, qc.Pivot())
            await door.held.wait()
            letting = asyncio.create_task(job.let_go())
            await time_to_go_too_far(qemu)
            assert not letting.done()
            door.open.set()
            async with asyncio.timeout(20):
                await letting
            assert job.state.status != "pending"
            await job.wait()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_held_disk_is_let_go_where_nobody_follows_its_job_any_more(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            door = Door()
            job = await held_by(vm, door, qc.Pivot())
            await door.held.wait()
            with vm.events("BLOCK_JOB_CANCELLED") as cancelled:
                await job.detach()
                async with asyncio.timeout(20):
                    await anext(cancelled)
            with pytest.raises(qc.JobDetached, match="no longer followed"):
                await job.wait()
            assert await files(vm) == [chain.top, chain.base], "the pivot is undone"
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


# -- what goes wrong ------------------------------------------------------------------------------


async def test_a_job_that_does_not_heed_its_deadline_is_left_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancellation does not reach QEMU, nor does what would be asked after it."""
    monkeypatch.setattr(job_module, "GRACE", 0.2)
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            job = await vm.commit("top", policy=qc.Hold(), timeout=1.0)
            await job.ready()
            between.to_qemu = lambda message: "drop"
            with pytest.raises(qc.DeadlineExceeded, match="is left in QEMU") as late:
                await job.wait()
            assert f"qmpcommit abort QMP {job.id}" in str(late.value)
            between.to_qemu = let_pass
        async with qc.Session.connect(between.path) as vm:
            (left,) = await vm.execute("query-jobs")
            assert (left["id"], left["status"]) == (job.id, "ready")
            assert (await (await vm.adopt(job.id, policy=qc.Abort())).wait()).action == "abort"
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("how", ["deadline", "detach"])
async def test_who_leaves_in_a_hook_after_the_pivot_is_told_of_the_pivot(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(job_module, "GRACE", 0.2)
    chain = make_chain(folder)
    called = asyncio.Event()

    async def hook(outcome: qc.CommitOutcome) -> None:
        called.set()
        await asyncio.Event().wait()

    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            limit = 2.0 if how == "deadline" else None
            job = await vm.commit(
                "top", policy=qc.Pivot(), on_pivot=hook, delete=True, timeout=limit
            )
            await called.wait()
            if how == "detach":
                await job.detach()
            with pytest.raises(qc.QmpCommitError, match="had ended before: pivoted") as left:
                await job.wait()
            kind = qc.DeadlineExceeded if how == "deadline" else qc.JobDetached
            assert type(left.value) is kind
            text = str(left.value)
            assert f"The image to boot is {chain.base}, and {chain.top} must never" in text
            assert "left in QEMU" not in text
            assert "goes on in QEMU" not in text
            assert "valid only under" not in text
            ended: Any = left.value.facts["outcome"]
            assert (ended["action"], ended["deleted"]) == ("pivot", [])
            assert chain.top.exists()
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


class Exit(BaseException):
    """What ends a process, as `SystemExit` does."""


async def test_what_would_end_the_process_fails_a_hook_like_any_other_error(folder: Path) -> None:
    chain = make_chain(folder)

    async def hook(outcome: qc.CommitOutcome) -> None:
        raise Exit

    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("top", policy=qc.Pivot(), on_pivot=hook, delete=True)
            outcome = await job.wait()
            assert (outcome.action, outcome.hook, outcome.deleted) == ("pivot", "failed", [])
            await nothing_runs(vm)
        await qemu.quit()
    assert chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1])


# -- a guest that is held back for it -------------------------------------------------------------


async def test_the_outcome_tells_what_was_done_to_the_guest(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("top", policy=qc.Pivot(), converge=qc.Converge(deadline=60))
            outcome = await job.wait()
            assert outcome.converge is not None
            assert (outcome.converge["steps"], outcome.converge["restored"]) == ((), True)
            assert outcome.warnings == []
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("decision", ["pivot", "fails"])
async def test_limits_that_are_not_back_are_told_of_with_the_outcome(
    decision: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(folder)

    async def not_restored(*args: Any, **options: Any) -> ConvergeReport:
        return ConvergeReport(verdict="ready", seconds=1.0, restored=False, remark="QEMU says no")

    async def policy(ready: qc.Ready) -> qc.Pivot:
        if decision == "fails":
            raise ZeroDivisionError
        return qc.Pivot()

    monkeypatch.setattr(converge_module, "converge", not_restored)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("top", policy=policy, converge=qc.Converge(deadline=60))
            if decision == "fails":
                with pytest.raises(qc.CommitFailed):
                    await job.wait()
                assert job.outcome is None
            else:
                (warning,) = (await job.wait()).warnings
                assert warning == "the disk's former I/O limits are not back: QEMU says no"
            await nothing_runs(vm)
        await qemu.quit()
    assert_disk(chain.top if decision == "fails" else chain.base, chain.pictures[-1])


async def test_a_job_that_is_let_go_leaves_no_watch_over_its_guest(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("top", policy=qc.Hold(), converge=qc.Converge(deadline=60))
            await job.ready()
            await job.detach()
            names = [task.get_name() for task in asyncio.all_tasks()]
            assert not [name for name in names if name.endswith(job.id)]
            async with qc.Session.connect(qemu.qmp2) as other:
                await (await other.adopt(job.id, policy=qc.Abort())).wait()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_the_first_of_two_decisions_in_one_moment_counts(folder: Path) -> None:
    for first, second in (("keep", "pivot"), ("abort", "keep"), ("keep", "recycle")):
        (place := folder / f"{first}-{second}").mkdir()
        chain = make_chain(place)
        async with storage_daemon(place, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("top", policy=qc.Hold())
            await job.ready()
            getattr(job, first)()
            with pytest.raises(qc.JobConflict, match="decided already"):
                job.recycle(place / "fresh") if second == "recycle" else getattr(job, second)()
            assert (await job.wait()).action == first
            await vm.close()
            await qemu.quit()
        assert_disk(chain.top, chain.pictures[-1])


async def test_one_overlay_is_laid_of_two_that_are_named_in_one_moment(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        job = await vm.commit("vda", policy=qc.Hold())
        await job.ready()
        job.recycle(folder / "one")
        job.recycle(folder / "one")
        with pytest.raises(qc.JobConflict, match=r"recycle with .*one"):
            job.recycle(folder / "two")
        outcome = await job.wait()
        assert outcome.active is not None
        assert outcome.active.filename == str(folder / "one")
        await vm.close()
        await qemu.quit()
    assert_disk(folder / "one", chain.pictures[-1])
    assert not (folder / "two").exists()
