"""What a ledger holds goes on, whatever it is: over all of its VMs, to its end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from qmpcommit.commit.job import see_through
from qmpcommit.commit.ledger import COMMIT, read_ledger
from qmpcommit.errors import InvalidRequest, JobNotFound
from qmpcommit.qmp.process import process_identity
from qmpcommit.recovery.doing import opened

if TYPE_CHECKING:
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.outcome import CommitOutcome
    from qmpcommit.commit.policy import AskedPolicy
    from qmpcommit.commit.stale_layers import OnPivot
    from qmpcommit.commit.vm import VM


async def resume(
    ledger: Ledger,
    vms: VM | str | os.PathLike[str] | Iterable[VM | str | os.PathLike[str]],
    *,
    policy: AskedPolicy | None = None,
    on_pivot: OnPivot | None = None,
) -> CommitOutcome:
    """Go on with what a ledger holds, to its end: ``await qc.resume(ledger, [vm1, vm2])``.

    `vms` are all VMs that it is over, as sessions or monitors' addresses, which are connected for
    it. What is no value is to be given again: a `policy` that was a callable, `on_pivot`. It gives
    the outcome, and raises the errors, of what is gone on with; if it had ended, the same once
    more. Raises `JobNotFound` for an empty ledger, `InvalidRequest` where one can't be read, or
    where a VM of it is not among `vms`. A cancellation is as for what is gone on with.
    """
    noted = await read_ledger(ledger)
    if not noted:
        raise JobNotFound("the ledger holds nothing: nothing was begun, or its notes were removed")
    kind = noted.get("kind", COMMIT)
    if kind != COMMIT:
        raise InvalidRequest(f"a {kind} is not gone on with from a ledger by this version")
    async with AsyncExitStack() as stack:
        there = list(await opened(stack, vms))
        vm = vm_of(there, noted.get("plan", {}).get("vm", ""), noted.get("identity", ""))
        job = await vm.resume(ledger, policy=policy, on_pivot=on_pivot)
        return await see_through(job)


def vm_of(vms: Sequence[VM], name: str, identity: str) -> VM:
    """The VM that notes are of: the process that they tell of, or the one of that name.

    Raises `InvalidRequest` where none is.
    """
    same: list[VM] = [vm for vm in vms if identity and process_identity(vm.peer_pid) == identity]
    for vm in (*same, *(vm for vm in vms if vm.name == name), *(vms if len(vms) == 1 else ())):
        return vm
    raise InvalidRequest(
        f"the ledger tells of {name}, which is none of the VMs that were named"
        f" ({', '.join(vm.name for vm in vms) or 'none'}): name all of them. Nothing was done"
    )
