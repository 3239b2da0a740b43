"""Commit every disk of a VM that has an overlay, all at once over one session.

    python examples/commit_all_disks.py QMP [--keep]

Each disk pivots to its base (or keeps its overlay, with --keep). One that fails does not stop
the others: every disk gets a line, and the status is 1 if any failed.
"""

from __future__ import annotations

import asyncio
import sys

import qmpcommit as qc


async def commit_one(vm: qc.Session, disk: qc.Disk, policy: qc.Pivot | qc.Keep) -> bool:
    """Commit one disk and report it; whether it succeeded."""
    try:
        job = await vm.commit(disk.name, policy=policy)
        outcome = await job.wait()
    except qc.QmpCommitError as error:
        print(f"{disk.name}: {type(error).__name__}: {error.message}")
        return False
    assert outcome.active is not None
    print(f"{disk.name}: {outcome.action}, writes to {outcome.active.filename}")
    return True


async def main(qmp: str, policy: qc.Pivot | qc.Keep) -> int:
    """Commit them all; the exit status."""
    async with qc.Session.connect(qmp) as vm:
        disks = await vm.disks()
        for disk in disks:
            if len(disk.chain) < 2:
                print(f"{disk.name}: {'no overlay' if disk.chain else 'empty'}, left alone")
        overlaid = [disk for disk in disks if len(disk.chain) > 1]
        done = await asyncio.gather(*(commit_one(vm, disk, policy) for disk in overlaid))
    return 0 if all(done) else 1


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if word != "--keep"]
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit(__doc__)
    try:
        keep = "--keep" in sys.argv
        sys.exit(asyncio.run(main(arguments[0], qc.Keep() if keep else qc.Pivot())))
    except qc.QmpCommitError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
