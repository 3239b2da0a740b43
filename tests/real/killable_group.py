"""A group commit whose guest stands still, killed by SIGKILL at its n-th place.

Arguments: the monitor, how to freeze ("pause" or the agent's socket), the place's number, the file
to which the places are written as they are passed, and the fresh overlay of the first disk or "".
Two disks are kept, or the first is recycled.
"""

from __future__ import annotations

import asyncio
import sys

import qmpcommit as qc
from tests.ground.killing import places

QMP, FREEZE, DIE_AT, PLACES, FRESH = sys.argv[1:]


async def main() -> None:
    """From start to end."""
    async with qc.Session.connect(QMP) as vm:
        disks = {"vda": qc.Recycle(FRESH) if FRESH else qc.Keep(), "vdb": qc.Keep()}
        if FREEZE == "pause":
            await vm.commit_group(disks, freeze="pause")
        else:
            await vm.commit_group(disks, freeze="agent", agents=FREEZE)


places(PLACES, int(DIE_AT))
asyncio.run(main())
