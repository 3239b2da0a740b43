"""Back a running disk up, consistent for the guest, and merge the snapshot away again.

    python examples/quiesce.py QMP DISK OVERLAY BACKUP [AGENT]

The guest's file systems are frozen through its agent's socket AGENT (without it the guest is
paused) for as long as QEMU needs to put OVERLAY over DISK. Then the guest goes on, the file below
is copied to BACKUP, and a commit brings what was written meanwhile back and removes OVERLAY.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from typing import Literal

import qmpcommit as qc


async def main(qmp: str, disk: str, overlay: str, backup: str, agent: str | None = None) -> None:
    """Freeze, snapshot, thaw, copy, commit."""
    async with qc.Session.connect(qmp) as vm:
        active = (await vm.disk(disk)).chain[0]
        how: Literal["agent", "pause"] = "agent" if agent else "pause"
        async with qc.freeze(vm, how, agents=agent, limit=5) as quiet:
            snapshot = {"node-name": active.node_name, "snapshot-file": overlay, "format": "qcow2"}
            names = {"snapshot-node-name": "quiesced-overlay"}
            await vm.execute("blockdev-snapshot-sync", {**snapshot, **names})
        held = f"{quiet.seconds * 1000:.0f} ms" if quiet.seconds else "no time: it did not run"
        print(f"{disk}: the guest stood still for {held}")
        await asyncio.to_thread(shutil.copyfile, active.filename, backup)
        print(f"{active.filename} as it was then: {backup}")
        job = await vm.commit(disk, policy=qc.Pivot(), shallow=True, delete=True)
        outcome = await job.wait()
        assert outcome.active is not None
        print(f"{disk}: writes to {outcome.active.filename} again")


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    try:
        asyncio.run(main(*sys.argv[1:]))
    except qc.QmpCommitError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
