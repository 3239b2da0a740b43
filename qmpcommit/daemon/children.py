"""Commits that the daemon asks for as a part of something else: they are found again by their jobs.

Whoever asks for one has noted its job's id before, so that none is asked for twice.
"""

from __future__ import annotations

from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.promise import Promise


async def promised(engine: Engine, vm: str, job_id: str, since: float = 0.0) -> Promise | None:
    """The one that was asked for already, perhaps by a former daemon; None where none was."""
    for promise in engine.live.values():
        if (promise.vm, promise.job_id) == (vm, job_id):
            return promise
    sql = "SELECT id FROM commits WHERE vm = ? AND job_id = ? AND created >= ?"
    rows = await engine.journal.read(sql, vm, job_id, since)
    return await engine.commit(rows[0]["id"]) if rows else None
