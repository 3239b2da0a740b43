"""A group commit whose guest stands still, killed by SIGKILL at its n-th place.

Arguments: the monitor, how to freeze ("pause" or the agent's socket), the place's number, and the
file to which the places are written as they are passed. Two disks are kept.
"""

from __future__ import annotations

import asyncio
import sys

import qmpcommit as qc
from tests.ground.killing import places

QMP, FREEZE, DIE_AT, PLACES = sys.argv[1:]


async def main() -> None:
    """From start to end."""
    async with qc.Session.connect(QMP) as vm:
        disks = ["vda", "vdb"]
        if FREEZE == "pause":
            await vm.commit_group(disks, policy=qc.Keep(), freeze="pause")
        else:
            await vm.commit_group(disks, policy=qc.Keep(), freeze="agent", agent=FREEZE)


places(PLACES, int(DIE_AT))
asyncio.run(main())
