"""A commit that exists already: somebody else's job, or one of ours whose process died."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpcommit.block.bitmaps import plan_carrying
from qmpcommit.commit.claim import Claim, lives, owner_in
from qmpcommit.commit.in_use import use_of
from qmpcommit.commit.job import CommitJob
from qmpcommit.commit.plan import Plan, adopted_plan
from qmpcommit.commit.policy import AnyPolicy, PolicyCall
from qmpcommit.commit.stale_layers import Around, nobody_met
from qmpcommit.errors import JobConflict, JobNotFound

if TYPE_CHECKING:
    from qmpcommit.commit.driver import Resumed
    from qmpcommit.commit.vm import VM


async def adopted(
    vm: VM,
    job_id: str,
    policy: AnyPolicy | PolicyCall,
    *,
    undoes: bool,
    timeout: float | None,
) -> CommitJob:
    """What follows the job of that id (``query-block-jobs``), whoever began it.

    One that is PENDING already is cancelled if this `undoes` it, else finalized; one that copies
    what its disk does not use any more is cancelled in any case. Raises
    `JobNotFound`, or `JobConflict` where it is no commit.
    """
    jobs = {job["device"]: job for job in await vm.execute("query-block-jobs")}
    job = jobs.get(job_id)
    if job is None:
        raise JobNotFound(
            f"QEMU of {vm.name} has no block job '{job_id}'"
            f" (its block jobs: {', '.join(jobs) or 'none'})",
            vm=vm.name,
            job_id=job_id,
        )
    if job.get("type") != "commit":
        raise JobConflict(
            f"job '{job_id}' of {vm.name} is a {job.get('type')} job, not a commit;"
            " nothing was sent",
            vm=vm.name,
            job_id=job_id,
        )
    graph = await vm.graph()
    plan = adopted_plan(vm.name, graph, job_id, policy)
    made = CommitJob(
        vm,
        plan,
        timeout=timeout,
        adopted=True,
        auto_finalize=bool(job.get("auto-finalize", True)),
        undoes=undoes,
        stale=use_of(plan, graph)[1],
    )
    owner = owner_in(graph, plan.disk)
    if owner is not None and lives(owner) is False:  # who names the job may end what was left of it
        made.inherit(Claim(vm, owner, held=True))
    return made


async def resumed(
    vm: VM, plan: Plan, noted: Resumed, around: Around, *, timeout: float | None
) -> CommitJob:
    """What goes on with a commit of ours from what its `Ledger` holds.

    A member of a group is finalized by the barrier in `around` only; without one it is cancelled.
    """
    if around.barrier is not None:
        state = noted.state._replace(meets=True, prepares=True, auto_finalize=False)
        noted = noted._replace(state=state)
    elif noted.state.meets:
        around = around._replace(barrier=nobody_met)
    if noted.state.prepares and noted.state.running and noted.same_vm is not False:
        graph = await vm.graph()
        known = {plan.top.node_name, plan.base.node_name} <= graph.nodes.keys()
        if plan.carry_bitmaps and known:
            layers = [image.node_name for image in (plan.top, *plan.between)]
            around = around._replace(carrying=plan_carrying(graph, layers, plan.base.node_name))
    auto_finalize = bool(plan.arguments.get("auto-finalize", True))
    return CommitJob(
        vm, plan, timeout=timeout, around=around, auto_finalize=auto_finalize, resumed=noted
    )
