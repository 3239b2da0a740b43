"""A commit that goes on from what its ledger holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qmpcommit.block.chain import read_disks
from qmpcommit.block.throttle import put_back_by
from qmpcommit.callback import Noting
from qmpcommit.commit.claim import number_of
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.ledger import (
    COMMIT,
    Noted,
    expect_kind,
    plan_of,
    read_ledger,
    resumed_of,
)
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import AskedPolicy, parse_policy
from qmpcommit.errors import CommandRefused, InvalidRequest, JobNotFound, QmpCommitError
from qmpcommit.guest.marks import mark_of_flush, thaw_marked
from qmpcommit.guest.run_state import go_on
from qmpcommit.qmp.process import is_same, process_identity

if TYPE_CHECKING:
    from qmpcommit.block.chain import Disk
    from qmpcommit.commit.stale_layers import OnPivot
    from qmpcommit.commit.vm import VM


async def noted_in(vm: VM, ledger: Any) -> Noted:
    """All that a ledger holds; raises `JobNotFound` where that is nothing, `InvalidRequest`."""
    noted = await read_ledger(ledger)
    expect_kind(noted, COMMIT)
    if not noted or "state" not in noted or "plan" not in noted:
        raise JobNotFound(
            f"the ledger holds no commit of {vm.name}: none was begun, or its notes were removed",
            vm=vm.name,
        )
    return noted


def taken_up(
    noted: Noted,
    policy: AskedPolicy | None,
    on_pivot: OnPivot | None,
    pid: int | None,
) -> tuple[Plan, Resumed]:
    """What to go on with, now that this QEMU answers; raises `InvalidRequest`."""
    try:
        plan = plan_of(noted, None if policy is None else parse_policy(policy))
        resumed = resumed_of(noted, same_vm=_same_qemu(noted, pid))
    except QmpCommitError:
        raise
    except Exception as error:  # whatever has become of it on its way
        raise InvalidRequest(f"what the ledger holds can't be understood: {error!r}") from error
    where = {"disk": plan.disk.name, "job_id": plan.job_id}
    undecided = resumed.state.running and resumed.state.order.decision is None
    if plan.policy is None and plan.two_phase and undecided:
        raise InvalidRequest(
            f"the policy of job {plan.job_id} was a callable, which no ledger holds: give it again,"
            " as in resume(ledger, policy=...). Nothing was done",
            **where,
        )
    if noted.get("hooked") and on_pivot is None and resumed.outcome is None:
        raise InvalidRequest(
            f"job {plan.job_id} was begun with an on_pivot, which no ledger holds: give it again,"
            " as in resume(ledger, on_pivot=...). Nothing was done",
            **where,
        )
    return plan, resumed


def _same_qemu(noted: Noted, pid: int | None) -> bool | None:
    """Whether this process is the QEMU that the notes are of; None where that can't be told."""
    return is_same(noted.get("identity", ""), process_identity(pid))


async def never_begun(vm: VM, noted: Noted, plan: Plan) -> bool:
    """Whether a job that was to be sent never was: QEMU has none, and the disk is as it was."""
    if noted.get("step") != "block-commit" or not vm.connected:
        return False
    if any(job.id == plan.job_id for job in await vm.query_jobs()):
        return False
    disks = read_disks(await vm.graph())
    layers = [image.node_name for image in (plan.top, *plan.between, plan.base)]
    chains = ([image.node_name for image in disk.chain] for disk in disks)
    return any(set(layers) <= set(chain) for chain in chains)


async def repay(vm: VM, noted: Noted, ledger: Any) -> None:
    """What a former process did to the guest and could not undo any more."""
    if _same_qemu(noted, vm.peer_pid) is False:
        return
    noting = Noting(ledger, vm.log)
    repair = noted.get("repair")
    with suppress(CommandRefused):
        if repair:
            if not await put_back_by(vm, repair):
                await vm.execute(repair["execute"], repair.get("arguments"))
            await noting.note("unthrottle", anyway=True)
        if noted.get("stopped") and "overlay" not in noted:
            await go_on(vm)
            await paused_goes_on(vm, Plan.model_validate(noted["plan"]).disk)
            await noting.note("cont", anyway=True)


async def paused_goes_on(vm: VM, disk: Disk) -> None:
    """Let a guest go on that was paused for the last flush by somebody who was killed."""
    await thaw_marked(vm, owner=mark_of_flush(number_of(disk)))


def vm_of(vms: Sequence[VM], name: str, identity: str, *, alone: bool = True) -> VM:
    """The VM that notes are of: the process that they tell of, or the one of that name.

    If it is all that was named, and the only one that the notes are of (`alone`), it is that one.
    Raises `InvalidRequest` where none is.
    """
    same: list[VM] = [vm for vm in vms if identity and process_identity(vm.peer_pid) == identity]
    for vm in (
        *same,
        *(vm for vm in vms if vm.name == name),
        *(vms if alone and len(vms) == 1 else ()),
    ):
        return vm
    raise InvalidRequest(
        f"the ledger tells of {name}, which is none of the VMs that were named"
        f" ({', '.join(vm.name for vm in vms) or 'none'}): name all of them. Nothing was done"
    )
