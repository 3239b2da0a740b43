"""One ``blockdev-create`` job, from its start to its dismissal.

A QEMU before 8 that is asked for its nodes meanwhile dies: see `Monitor`, which waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qmpcommit.errors import CommitFailed
from qmpcommit.qmp.monitor import Monitor

if TYPE_CHECKING:
    from qmpcommit.qmp.subscriptions import EventStream

PATIENCE = 0.5
"""Seconds of silence after which QEMU is asked about the creation."""

TRIES = 20
"""How often QEMU is asked that can't tell how fast it encrypts."""

_UNMEASURED = "Unable to get accurate CPU usage"
"""What it says on a busy host, by chance, where it chooses the work of a key."""


async def create(
    monitor: Monitor, job: str, filename: str, options: Mapping[str, Any], *, tries: int = TRIES
) -> None:
    """Create what `options` say; raises `CommitFailed` that names the file, or `CommandRefused`."""
    with monitor.events("JOB_STATUS_CHANGE") as changes:
        await monitor.execute("blockdev-create", {"job-id": job, "options": options})
        await _concluded(monitor, job, filename, changes)
    error = str((await _listed(monitor, job) or {}).get("error") or "")
    await monitor.execute("job-dismiss", {"id": job})
    if _UNMEASURED in error and tries > 1:
        await create(monitor, job, filename, options, tries=tries - 1)
    elif error:
        raise CommitFailed(f"QEMU could not create {filename}: {error}", error=error)


async def forget(monitor: Monitor, job: str, filename: str) -> None:
    """See a former process's job end, and dismiss it."""
    with monitor.events("JOB_STATUS_CHANGE") as changes:
        found = await _listed(monitor, job)
        if found is None:
            return
        if found.get("status") != "concluded":
            await _concluded(monitor, job, filename, changes)
    await monitor.execute("job-dismiss", {"id": job})


async def _listed(monitor: Monitor, job: str) -> Mapping[str, Any] | None:
    jobs = await monitor.execute("query-jobs")
    return next((entry for entry in jobs if entry.get("id") == job), None)


async def _concluded(monitor: Monitor, job: str, filename: str, changes: EventStream) -> None:
    """Wait for its end; an event that does not come is asked for."""
    with suppress(TimeoutError):
        async with asyncio.timeout(monitor.command_timeout):
            while not await _is_over(monitor, job, changes):
                pass
            return
    raise CommitFailed(f"QEMU did not create {filename} within {monitor.command_timeout:g} s")


async def _is_over(monitor: Monitor, job: str, changes: EventStream) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            async for change in changes.raw():
                if (change.get("id"), change.get("status")) == (job, "concluded"):
                    return True
    found = await _listed(monitor, job)
    return found is None or found.get("status") == "concluded"
