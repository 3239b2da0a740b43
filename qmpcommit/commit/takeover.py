"""A commit that exists already: somebody else's job, or one of ours whose process died."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from qmpcommit.block.bitmaps import bitmaps_of, plan_carrying
from qmpcommit.block.throttle import put_back_of
from qmpcommit.commit.claim import Claim, job_number, lives, owner_in
from qmpcommit.commit.concluded import concluded_plan
from qmpcommit.commit.driver import Adopted
from qmpcommit.commit.in_use import use_of
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.objections import refuse_idle
from qmpcommit.commit.plan import Plan, adopted_plan
from qmpcommit.commit.policy import Pivot
from qmpcommit.commit.preconditions import check_commands, told
from qmpcommit.commit.resuming import paused_goes_on
from qmpcommit.commit.stale_layers import Around, nobody_met
from qmpcommit.commit.steering import block_job
from qmpcommit.errors import InvalidRequest, JobConflict
from qmpcommit.names import JOB_PREFIX

if TYPE_CHECKING:
    from qmpcommit.block.bitmaps import Carrying
    from qmpcommit.block.graph import BlockGraph
    from qmpcommit.commit.driver import Resumed
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.policy import AnyPolicy, PolicyCall
    from qmpcommit.commit.request import Stale
    from qmpcommit.commit.stale_layers import OnPivot
    from qmpcommit.commit.vm import VM


class Asked(NamedTuple):
    """What whoever adopts a commit wants of it, as `Session.commit` takes it.

    `pending` tells what becomes of one that is PENDING already.
    """

    policy: AnyPolicy | PolicyCall
    pending: Literal["finalize", "cancel", "leave"] = "finalize"
    stale: Stale = "leave"
    on_pivot: OnPivot | None = None
    carry_bitmaps: bool = True
    timeout: float | None = None
    ledger: Ledger | None = None

    def check(self) -> None:
        """Refuse what could not be done when its time comes; raises `InvalidRequest`."""
        if self.pending not in ("finalize", "cancel", "leave"):
            raise InvalidRequest(
                f"pending is 'finalize', 'cancel' or 'leave', not {self.pending!r}"
            )
        refuse_idle(self.policy, stale=self.stale, on_pivot=self.on_pivot)
        Around(on_pivot=self.on_pivot).check()


async def adopted(vm: VM, job_id: str, asked: Asked) -> CommitJob:
    """What follows the job of that id (``query-block-jobs``), whoever began it.

    One that copies what its disk does not use any more is cancelled in any case. Raises
    `JobNotFound`, or `JobConflict` where it is no commit, or its bitmaps can't be carried now.
    """
    job = await block_job(vm, job_id)
    if job.get("type") != "commit":
        raise JobConflict(
            f"job '{job_id}' of {vm.name} is a {job.get('type')} job, not a commit;"
            " nothing was sent",
            vm=vm.name,
            job_id=job_id,
        )
    graph = await vm.graph()
    status, spares, remark = str(job.get("status")), False, ""
    if job_id in graph.jobs:
        plan = adopted_plan(vm.name, graph, job_id, asked.policy)
    else:  # it has ended, or this QEMU does not tell what a job holds
        found = concluded_plan(vm.name, graph, job_id, asked.policy)
        plan, remark = found.plan, found.remark
        spares = status == "concluded" and not found.known and not job.get("error")
    plan = replace(plan, stale=asked.stale, carry_bitmaps=asked.carry_bitmaps)
    plan = await asyncio.to_thread(told, plan, graph, vm.peer_pid)
    check_commands(plan, asked.on_pivot)
    around = Around(
        on_pivot=asked.on_pivot,
        carrying=carrying_of_job(plan, graph, status, refuses=asked.pending != "leave"),
        files=await asyncio.to_thread(vm.files_of, plan) if plan.follows_files else {},
        cwd=vm.cwd,
        gate=vm.gate,
        ledger=asked.ledger,
    )
    owner = owner_in(graph, plan.disk)
    owned = owner is not None and lives(owner) is not False
    by_itself = bool(job.get("auto-finalize", True))
    # Who lives sees to the end; one that is held when it is taken up is to be ended at once.
    followed = owner is not None and lives(owner) is True and not by_itself
    followed = followed and (status != "pending" or asked.pending == "leave")
    made = CommitJob(
        vm,
        plan,
        timeout=asked.timeout,
        around=around,
        adopted=Adopted(
            undoes=asked.pending == "cancel",
            stale=use_of(plan, graph)[1],
            owned=owned,
            ours=job_id.startswith(JOB_PREFIX)
            or (owner is not None and owner.job == job_number(job_id)),
            asked=asked.stale != "leave" or asked.on_pivot is not None,
            spares=spares or (owned and status == "concluded"),
            remark=remark,
            unheld=by_itself,
            followed=followed,
        ),
        auto_finalize=by_itself,
    )
    if owner is not None and lives(owner) is False:  # who names the job may end what was left of it
        made.inherit(Claim(vm, owner, held=True))
        await put_back_of(vm, plan.disk, graph)
        await paused_goes_on(vm, plan.disk)
    return made


def carrying_of_job(
    plan: Plan, graph: BlockGraph, status: str, *, refuses: bool
) -> Carrying | None:
    """What has to be carried into the base of an adopted commit; raises `JobConflict`.

    Unless it holds its disk, it waits as it is until others need its bitmaps no more. What the
    base of one that has concluded has by then was carried by its owner.
    """
    layers = [image.node_name for image in (plan.top, *plan.between)]
    if not plan.carry_bitmaps or not {*layers, plan.base.node_name} <= graph.nodes.keys():
        return None
    carrying = plan_carrying(graph, layers, plan.base.node_name)
    if status == "concluded":
        there = {bitmap.name for bitmap in bitmaps_of(graph, plan.base.node_name)}
        left = {name: found for name, found in carrying.names.items() if name not in there}
        return carrying._replace(names=left)
    if carrying.busy and status != "pending" and refuses:
        raise JobConflict(
            f"job {plan.job_id} on {plan.disk} of {plan.vm} can't be taken up with the disk's"
            f" bitmaps now: {', '.join(carrying.busy)} is busy with another job (a backup?). It"
            " goes on as it is. Wait for the other, or take it up without carrying bitmaps",
            hint="--no-bitmaps does that",
            vm=plan.vm,
            disk=plan.disk.name,
            job_id=plan.job_id,
        )
    return carrying


async def bitmaps_to_carry(vm: VM, job_id: str) -> Carrying | None:
    """The same of a job of that id that is to be pivoted; raises what `adopted` raises for them."""
    graph = await vm.graph()
    status = next((job.status for job in await vm.query_jobs() if job.id == job_id), "")
    known = job_id in graph.jobs  # else it has ended, or this QEMU does not tell what a job holds
    plan = (
        adopted_plan(vm.name, graph, job_id, Pivot())
        if known
        else (concluded_plan(vm.name, graph, job_id, Pivot()).plan)
    )
    return carrying_of_job(plan, graph, status, refuses=True)


async def resumed(
    vm: VM, plan: Plan, noted: Resumed, around: Around, *, timeout: float | None
) -> CommitJob:
    """What goes on with a commit of ours from what its `Ledger` holds.

    A member of a group is finalized by the barrier in `around` only; without one it is cancelled.
    """
    if around.barrier is not None:
        barrier = noted.state.barrier._replace(meets=True, prepares=True)
        state = noted.state._replace(barrier=barrier, auto_finalize=False)
        noted = noted._replace(state=state)
    elif noted.state.barrier.meets:
        around = around._replace(barrier=nobody_met)
    if noted.state.barrier.prepares and noted.state.running and noted.same_vm is not False:
        graph = await vm.graph()
        known = {plan.top.node_name, plan.base.node_name} <= graph.nodes.keys()
        if plan.carry_bitmaps and known:
            layers = [image.node_name for image in (plan.top, *plan.between)]
            around = around._replace(carrying=plan_carrying(graph, layers, plan.base.node_name))
    auto_finalize = bool(plan.arguments.get("auto-finalize", True))
    return CommitJob(
        vm, plan, timeout=timeout, around=around, auto_finalize=auto_finalize, resumed=noted
    )
