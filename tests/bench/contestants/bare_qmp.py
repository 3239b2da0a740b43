"""The least that a script over qemu.qmp can do: ``bare_qmp.py QMP NODE``."""

import asyncio
import sys

from qemu.qmp import QMPClient

NAMES = ("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED")


async def main(path: str, node: str) -> None:
    client = QMPClient()
    await client.connect(path)
    with client.listener(NAMES) as events:
        await client.execute("block-commit", {"job-id": "j", "device": node})
        async for event in events:
            if event["event"] == "BLOCK_JOB_COMPLETED":
                break
            await client.execute("job-complete", {"id": "j"})
    await client.disconnect()


asyncio.run(main(sys.argv[1], sys.argv[2]))
