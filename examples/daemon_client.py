"""Have the daemon commit a disk, follow it, and decide, from any asyncio program.

    python examples/daemon_client.py SOCKET VM DISK [pivot|keep|abort]

SOCKET is where qmpcommitd listens. The commit is promised by the daemon, so this program may be
killed at any time: run it again, and it finds the commit and goes on with it. A restart of the
daemon meanwhile only makes it wait.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import qmpcommit as qc


async def follow(events: AsyncIterator[qc.DaemonEvent], commit: str) -> None:
    """What a dashboard would show; the events go on where a lost connection was cut."""
    async for event in events:
        if event.commit == commit:
            print(f"event {event.id}: {event.data['state']} {event.data['phase']}".rstrip())
            if event.data["state"] not in ("queued", "running"):
                return


async def main(socket: str, name: str, disk: str, decision: str = "pivot") -> int:
    """Commit, and decide when it is READY; the exit status."""
    async with qc.Client(socket) as host, host.events(vm=name) as events:
        running = await host.commits(vm=name, state="running")
        mine = [job for job in running if job.disk == disk]
        job = mine[0] if mine else await host.vm(name).commit(disk, policy=qc.Hold())
        following = asyncio.create_task(follow(events, job.id))
        try:
            await job.ready()
            print(f"{disk} of {name} is READY: {decision}")
            await {"pivot": job.pivot, "keep": job.keep, "abort": job.abort}[decision]()
            outcome = await job.wait()
            await following
        except qc.QmpCommitError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        finally:
            following.cancel()
            await asyncio.wait({following})
        assert outcome.active is not None
        print(f"{outcome.action}: {disk} of {name} now writes to {outcome.active.filename}")
        for file in outcome.invalidated:
            print(f"never to be booted again: {file}")
    return 0


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 5:
        sys.exit(__doc__)
    sys.exit(asyncio.run(main(*sys.argv[1:])))
