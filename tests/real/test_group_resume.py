"""A group's member whose process was killed while QEMU held its disk, taken up again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.facts import Choice
from qmpcommit.commit.phases import Order, Phase, Preparation, State
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.stale_layers import Barrier
from qmpcommit.group.resume import ResumableGroup, Resume
from qmpcommit.guest.run_state import How
from tests.ground.images import MIB, assert_disk, make_chain
from tests.ground.machines import machine, storage_daemon
from tests.ground.proxy import proxy

HELD = State(
    two_phase=True,
    phase=Phase.DECIDED,
    began=True,
    auto_finalize=False,
    order=Order(decision=Choice.PIVOT, by="policy", tries=1, in_flight=True),
    barrier=Preparation(prepares=True, meets=True),
)


async def leave_pending(vm: qc.Session) -> Plan:
    """Go so far with plain commands, and give the plan that would have been noted."""
    plan = await vm.plan("top", policy=qc.Pivot())
    plan = replace(plan, arguments={**plan.arguments, "auto-finalize": False})
    with vm.events("JOB_STATUS_CHANGE") as changes:
        await vm.execute("block-commit", plan.arguments)
        async for change in changes.raw():
            if change["status"] == "ready":
                await vm.execute("block-job-complete", {"device": plan.job_id})
            if change["status"] == "pending":
                return plan
    raise AssertionError


@pytest.mark.parametrize("answer", ["met", "refused", "no barrier", "decided before"])
async def test_a_member_is_finalized_only_with_the_others(folder: Path, answer: str) -> None:
    chain = make_chain(folder)
    met: list[str] = []

    async def barrier() -> str | None:
        met.append(answer)
        return None if answer == "met" else "another failed"

    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            plan = await leave_pending(vm)
        async with qc.Session.connect(qemu.qmp) as vm:
            prepared = HELD.barrier._replace(prepared=answer == "decided before")
            state = HELD._replace(barrier=prepared)
            given = barrier if answer in ("met", "refused") else None
            job = await vm.resume(plan, Resumed(state), barrier=given)
            if answer in ("met", "decided before"):
                assert (await job.wait()).action == "pivot"
            else:
                with pytest.raises(qc.CommitFailed) as failed:
                    await job.wait()
                assert ("another failed" if given else "were not taken up") in str(failed.value)
            assert met == ([answer] if given else [])
            pivoted = answer in ("met", "decided before")
            now = (await vm.disks())[0].active
            assert now is not None
            assert now.filename == str(chain.base if pivoted else chain.top)
        await qemu.quit()
    assert_disk(chain.base if pivoted else chain.top, chain.pictures[-1])


async def test_a_policy_is_asked_once_by_a_group_that_is_taken_up(folder: Path) -> None:
    chain = make_chain(folder)
    asked: list[str] = []

    async def policy(ready: qc.Ready) -> qc.Keep:
        asked.append(ready.job_id)
        return qc.Keep()

    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            left = ResumableGroup([(vm, "top")], policy=qc.Hold())
            await left.start()
            await left.ready()
            (job,) = left.jobs
            plan, state = job.plan, job.state
            await left.leave()
        async with qc.Session.connect(qemu.qmp) as vm:
            group = ResumableGroup([(vm, "top")], policy=policy, known_as=left.id)

            async def resume(barrier: Barrier) -> qc.CommitJob:
                return await vm.resume(plan, Resumed(state), barrier=barrier)

            await group.take_up([resume])
            assert (await group.wait()).action == "keep"
            assert asked == [job.id]
        await qemu.quit()
    for path in (chain.base, chain.top):
        assert_disk(path, chain.pictures[-1])


async def left_ready(vm: qc.Session) -> tuple[ResumableGroup, qc.CommitJob]:
    """A group whose process has left its one job READY."""
    left = ResumableGroup([(vm, "top")], policy=qc.Hold())
    await left.start()
    await left.ready()
    await left.leave()
    return left, left.jobs[0]


def taking(vm: qc.Session, job: qc.CommitJob) -> Resume:
    async def resume(barrier: Barrier) -> qc.CommitJob:
        return await vm.resume(job.plan, Resumed(job.state), barrier=barrier)

    return resume


async def test_it_tells_how_far_it_is_and_who_decided(folder: Path) -> None:
    chain = make_chain(folder, bulk=33 * MIB)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            group = ResumableGroup([(vm, "top")], policy=qc.Hold(), bandwidth="1MiB")
            assert group.stage == "copying"
            await group.start()
            assert (group.stage, group.decided_by) == ("copying", "")
            await group.jobs[0].set_bandwidth(0)
            await group.ready()
            assert (group.stage, group.decided_by) == ("ready", "")
            group.pivot()
            await group.wait()
            assert (group.stage, group.decided_by) == ("over", "caller")
            await group.hand_over()  # there is nothing any more
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_nobody_can_decide_otherwise_while_the_decision_is_written_down(folder: Path) -> None:
    chain = make_chain(folder)
    begun, written = asyncio.Event(), asyncio.Event()

    async def write_down(finals: Sequence[str]) -> None:
        begun.set()
        await written.wait()

    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm, asyncio.timeout(20):
            group = ResumableGroup([(vm, "top")], policy=qc.Pivot(), on_decision=write_down)
            ending = asyncio.create_task(group.run())
            await begun.wait()
            assert group.stage == "finalizing"
            with pytest.raises(qc.JobConflict):
                group.keep()
            written.set()
            assert (await ending).action == "pivot"
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_is_not_decided_is_handed_over_as_it_is(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            group = ResumableGroup([(vm, "top")], policy=qc.Hold(), timeout=600)
            await group.start()
            await group.ready()
            await group.hand_over()
            await group.leave()
            (left,) = await vm.execute("query-jobs")
            assert left["status"] == "ready"
            next_one = ResumableGroup([(vm, "top")], policy=qc.Hold(), known_as=group.id)
            await next_one.take_up([taking(vm, group.jobs[0])])
            await next_one.ready()
            next_one.pivot()
            assert (await next_one.wait()).action == "pivot"
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("heard", [True, False], ids=["all held", "never held"])
async def test_what_is_decided_is_ended_or_undone_before_it_is_handed_over(
    heard: bool, folder: Path
) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            group = ResumableGroup([(vm, "top")], policy=qc.Hold(), hold_limit=600)
            await group.start()
            await group.ready()
            if not heard:
                between.to_client = lambda message: (
                    "drop" if message.get("data", {}).get("status") == "pending" else "pass"
                )
            group.pivot()
            async with asyncio.timeout(20):
                while group.stage == "ready":
                    await asyncio.sleep(0)
            await group.hand_over()
            await group.leave()
            assert await vm.execute("query-jobs") == []
            active = (await vm.disks())[0].chain[0].filename
            assert active == str(chain.base if heard else chain.top)
        await qemu.quit()
    assert_disk(chain.base if heard else chain.top, chain.pictures[-1])


async def test_its_deadline_counts_for_what_is_taken_up_too(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            left, job = await left_ready(vm)
            group = ResumableGroup([(vm, "top")], policy=qc.Hold(), known_as=left.id, timeout=0.2)
            await group.take_up([taking(vm, job)])
            with pytest.raises(qc.DeadlineExceeded, match=r"0\.2 s"):
                await group.wait()
            assert await vm.execute("query-jobs") == []
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_where_one_can_not_be_taken_up_the_others_stay_as_they_are(folder: Path) -> None:
    chain = make_chain(folder)

    async def broken(barrier: Barrier) -> qc.CommitJob:
        raise qc.MonitorLost("its monitor is away")

    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            left, job = await left_ready(vm)
            members = [(vm, "top"), (vm, "other")]
            group = ResumableGroup(members, policy=qc.Hold(), known_as=left.id)
            with pytest.raises(qc.MonitorLost, match="its monitor is away"):
                await group.take_up([taking(vm, job), broken])
            assert vm.jobs == ()
            (listed,) = await vm.execute("query-jobs")
            assert (listed["id"], listed["status"]) == (job.id, "ready")
            await (await vm.adopt(job.id, policy=qc.Abort())).wait()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_an_abort_meets_those_too_that_are_taken_up_after_it(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            left, job = await left_ready(vm)
            group = ResumableGroup([(vm, "top")], policy=qc.Hold(), known_as=left.id)
            group.abort()
            await group.take_up([taking(vm, job)])
            assert (await group.wait()).action == "abort"
            assert await vm.execute("query-jobs") == []
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_member_whose_nodes_are_gone_is_not_asked_for_its_bitmaps(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain, export=False) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            plan = await leave_pending(vm)
            with vm.events("JOB_STATUS_CHANGE") as changes:
                await vm.execute("job-cancel", id=plan.job_id)
                async for change in changes.raw():
                    if change["status"] in ("concluded", "null"):
                        break
            with suppress(qc.CommandRefused):
                await vm.execute("job-dismiss", id=plan.job_id)
            await vm.execute("blockdev-del", node_name="top")
            job = await vm.resume(plan, Resumed(HELD))
            with pytest.raises(qc.CommitFailed):
                await job.wait()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("freeze", ["pause", None])
async def test_it_tells_for_how_long_a_recycled_guest_stood_still(
    folder: Path, freeze: How | None
) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            left = ResumableGroup([(vm, "vda")], policy=qc.Hold(), freeze=freeze)
            await left.start()
            await left.ready()
            await left.leave()
            await left.leave()  # as whoever is asked twice to end
            group = ResumableGroup(
                [(vm, "vda")], policy=qc.Recycle(str(fresh)), freeze=freeze, known_as=left.id
            )
            assert group.quiesced == {}
            await group.take_up([taking(vm, left.jobs[0])])
            outcome = await group.wait()
            assert outcome.action == "recycle"
            if freeze is None:
                assert group.quiesced == {}
            else:
                assert group.quiesced == {vm.name: outcome.outcomes[0].quiesced}
                assert group.quiesced[vm.name] > 0
            assert (await vm.query_status()).running
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(fresh, chain.pictures[-1])
