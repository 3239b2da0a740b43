"""Commit disks of several VMs at one instant: all of them, or none.

    python examples/group_commit.py QMP:DISK [QMP:DISK ...] [--keep] [--hold-limit SECONDS]

What a VM manager does for an application whose data lie on several disks, or on several VMs: its
bases must all show the same moment. Before anything runs, whatever a killed run left holding
a disk is let go. The status is 0 if all were committed, 1 if none was, and 2 if it is known
which were and which were not.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack

import qmpcommit as qc


async def main(pairs: list[tuple[str, str]], policy: qc.Pivot | qc.Keep, limit: float) -> int:
    """Commit them; the exit status."""
    async with AsyncExitStack() as stack:
        vms: dict[str, qc.Session] = {}
        for qmp, _ in pairs:
            if qmp not in vms:
                vms[qmp] = await stack.enter_async_context(qc.Session.connect(qmp))
                for left in await qc.resolve_pending(vms[qmp]):
                    print(f"{left.disk} of {qmp} was held by job {left.job_id}: {left.action}")
        members = [(vms[qmp], disk) for qmp, disk in pairs]
        try:
            outcome = await qc.commit_group(members, policy=policy, hold_limit=limit, timeout=3600)
        except qc.GroupSplit as split:
            # A QEMU was lost after the decision. Each list has its own next step.
            print(f"pivoted: {split.pivoted}, not pivoted: {split.not_pivoted}")
            print(f"kept: {split.kept}, not kept: {split.not_kept}, unknown: {split.unknown}")
            return 2
        except qc.QmpCommitError as error:
            print(f"{type(error).__name__}: {error.message}")
            return 1
    for each in outcome.outcomes:
        assert each.active is not None
        held = (each.held or 0) * 1e3
        print(f"{each.disk}: {each.action}, writes to {each.active.filename}, held {held:.1f} ms")
    print(f"all bases show {outcome.instant}")
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    hold = 2.0
    if "--hold-limit" in words:
        place = words.index("--hold-limit")
        hold = float(words[place + 1])
        del words[place : place + 2]
    decision = qc.Keep() if "--keep" in words else qc.Pivot()
    names = [word.rpartition(":") for word in words if word != "--keep"]
    if not names or not all(qmp and disk for qmp, _, disk in names):
        sys.exit(__doc__)
    try:
        sys.exit(asyncio.run(main([(qmp, disk) for qmp, _, disk in names], decision, hold)))
    except qc.QmpCommitError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
