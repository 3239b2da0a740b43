"""What a ledger holds goes on, whatever it is: over all of its VMs, to its end."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeAlias, Union, cast

from qmpcommit.commit.job import see_through
from qmpcommit.commit.ledger import COMMIT, read_ledger
from qmpcommit.commit.resuming import vm_of
from qmpcommit.errors import InvalidRequest, JobNotFound
from qmpcommit.recovery.doing import opened

if TYPE_CHECKING:
    from qmpcommit.commit.ledger import Ledger
    from qmpcommit.commit.outcome import CommitOutcome
    from qmpcommit.commit.pace import Converge
    from qmpcommit.commit.policy import AskedPolicy
    from qmpcommit.commit.stale_layers import Hooks, OnPivot, OnStall
    from qmpcommit.commit.vm import VM
    from qmpcommit.cycles.discarding import Discarded
    from qmpcommit.cycles.run import Round
    from qmpcommit.group.outcome import GroupOutcome
    from qmpcommit.group.policy import AskedGroupPolicy
    from qmpcommit.guest.sockets import Sockets


Outcomes: TypeAlias = Union[
    "CommitOutcome",
    "GroupOutcome",
    tuple["CommitOutcome", ...],
    tuple["Round", ...],
    tuple["Discarded", ...],
]
"""What `resume` gives: of a commit, a group, a window, a cycle's round or a discard."""


async def resume(
    ledger: Ledger,
    vms: VM | str | os.PathLike[str] | Iterable[VM | str | os.PathLike[str]],
    *,
    agents: Sockets[Any] | None = None,
    policy: AskedGroupPolicy | None = None,
    on_pivot: OnPivot | None = None,
    on_stall: OnStall | None = None,
    converge: Converge | None = None,
) -> Outcomes:
    """Go on with what a ledger holds, to its end: ``await qc.resume(ledger, [vm1, vm2])``.

    `vms` are all VMs that it is over, as sessions or monitors' addresses, which are connected for
    it. What is no value is to be given again: a `policy` that was a callable, `on_pivot`,
    `on_stall` and `converge`; `agents` are guest agents' sockets, by the VMs as named. A window
    is closed, for whoever read in it is gone: it gives its commits' outcomes. A round or a discard
    goes on in the direction that was decided, and gives what `cycle` or `discard` gives. It gives
    the outcome, and raises the errors, of what is gone on with; if it had ended, the same once
    more. Raises `JobNotFound` for an empty ledger, `InvalidRequest` where one can't be read, or
    where a VM of it is not among `vms`. A cancellation is as for what is gone on with.
    """
    noted = await read_ledger(ledger)
    if not noted:
        raise JobNotFound("the ledger holds nothing: nothing was begun, or its notes were removed")
    kind = noted.get("kind", COMMIT)
    hooks: Hooks = {"on_pivot": on_pivot, "on_stall": on_stall, "converge": converge}
    async with AsyncExitStack() as stack:
        there = await opened(stack, vms)
        sockets = {vm: socket for vm, named in there.items()
                   if (socket := (agents or {}).get(named)) is not None}  # fmt: skip
        if kind == "group":
            from qmpcommit.group.resuming import resume_group

            return await resume_group(
                ledger, noted, list(there), agents=sockets, policy=policy, hooks=hooks
            )
        if kind == "window":
            from qmpcommit.window.book import resume_window

            return await resume_window(ledger, noted, list(there))
        if kind == "cycle":
            from qmpcommit.cycles.resuming import resume_round

            return await resume_round(ledger, noted, list(there), sockets)
        if kind != COMMIT:
            raise InvalidRequest(f"a {kind} is not gone on with from a ledger by this version")
        vm = vm_of(list(there), noted.get("plan", {}).get("vm", ""), noted.get("identity", ""))
        own = cast("AskedPolicy | None", policy)  # of a commit it is not one for a group
        job = await vm.resume(
            ledger, policy=own, on_pivot=on_pivot, on_stall=on_stall, converge=converge
        )
        return await see_through(job)
