"""A VM manager that owns a QMPClient, and lends it to qmpcommit for a commit.

    python examples/embed.py QMP DISK

The client is connected before and after: the session only shares it. Its typed events are
printed while the commit runs; at the end the manager goes on with its own client.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from qemu.qmp import QMPClient

import qmpcommit as qc


async def tell(events: AsyncIterator[qc.Event]) -> None:
    """What a manager would write into its own log."""
    async for event in events:
        print(f"event: {event.name} {event.job_id or ''}".rstrip())


async def main(qmp: str, disk: str) -> None:
    """Connect as the manager does, commit, and go on."""
    client = QMPClient("manager")
    await client.connect(qmp)
    try:
        async with qc.Session.over(client, name="web1") as vm:
            with vm.events("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED") as events:
                telling = asyncio.create_task(tell(events))
                job = await vm.commit(disk, policy=qc.Pivot())
                outcome = await job.wait()
            await telling  # it ends with the stream
        assert outcome.active is not None
        print(f"{outcome.disk} now writes to {outcome.active.filename}")
        for file in outcome.invalidated:
            print(f"never to be booted again: {file}")
        status = await client.execute("query-status")  # still connected, and still ours
        print(f"the guest is {status}")
    finally:
        await client.disconnect()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1], sys.argv[2]))
