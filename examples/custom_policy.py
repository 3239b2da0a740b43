"""A policy of your own: pivot only where the host has room for the base to grow.

    python examples/custom_policy.py QMP DISK [MINIMUM]

MINIMUM is the free space, as in 10GiB, that the base's file system must have at READY; with
less the overlay is kept. The policy is asked once, when the commit is READY, while the guest
goes on writing; it may take its time, and await what it likes. Ends with status 3 for a keep.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import qmpcommit as qc
from qmpcommit.units import parse_size, show_size


async def main(qmp: str, disk: str, minimum: str = "1GiB") -> int:
    """Commit with the policy; the exit status."""
    needed = parse_size(minimum)

    async def room_to_grow(ready: qc.Ready) -> qc.Pivot | qc.Keep:
        folder = Path(ready.base.filename).parent
        free = (await asyncio.to_thread(shutil.disk_usage, folder)).free
        print(f"{ready.disk} is READY; {folder} has {show_size(free)} free")
        return qc.Pivot() if free >= needed else qc.Keep()

    outcome = await qc.commit(qmp, disk, policy=room_to_grow)
    assert outcome.active is not None
    print(f"{outcome.action}: {outcome.disk} writes to {outcome.active.filename}")
    return 0 if outcome.action == "pivot" else 3


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        sys.exit(asyncio.run(main(*sys.argv[1:])))
    except qc.QmpCommitError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
