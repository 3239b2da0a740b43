"""A group's member whose process was killed while QEMU held its disk, taken up again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.commit.aftermath import Barrier
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.facts import Choice
from qmpcommit.commit.group_resume import ResumableGroup
from qmpcommit.commit.phases import Phase, State
from qmpcommit.commit.plan import Plan
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import storage_daemon

HELD = State(
    two_phase=True,
    phase=Phase.DECIDED,
    began=True,
    auto_finalize=False,
    decision=Choice.PIVOT,
    by="policy",
    tries=1,
    in_flight=True,
    prepares=True,
    meets=True,
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
            state = HELD._replace(prepared=answer == "decided before")
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
