"""What ended long ago is forgotten: at the start, and once an hour from then on."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress

from qmpcommit.daemon.config import Config
from qmpcommit.daemon.journal import Journal, JournalError, Statement

HOUR = 3600.0
"""Seconds between two times, where nothing is to be forgotten sooner."""

# Commits wait for the writer: what is far back in a row, or in the table, is looked at last.
# Of each base of a cycle the last commit is kept, for it tells whether the base is whole by itself.
_COMMITS = """
    DELETE FROM commits WHERE created < ? AND ended < ? AND rowid NOT IN (
        SELECT rowid FROM (
            SELECT rowid, max(ended) FROM commits
            WHERE plan IS NOT NULL AND vm IN (SELECT value FROM json_each(?))
            GROUP BY vm, json_extract(plan, '$.base.filename')
        )
    )
"""
_UNDERTAKINGS = "DELETE FROM undertakings WHERE created < ? AND ended < ?"
_EVENTS = """
    DELETE FROM events WHERE id < (SELECT id FROM events WHERE at >= ? ORDER BY id LIMIT 1)
"""
_KEYS = """
    DELETE FROM keys WHERE created < ?
    AND commit_id NOT IN (SELECT id FROM commits)
    AND commit_id NOT IN (SELECT id FROM undertakings)
"""


async def forget_old(config: Config, journal: Journal) -> None:
    """Forget what ended more than `Config.retain_days` ago, again and again."""
    retained = config.retain_days * 86400
    cycled = json.dumps(sorted({vm for cycle in config.cycle for vm, _ in cycle.disks}))
    while True:
        before = time.time() - retained
        journal.shrinks = True  # once that is written
        with suppress(JournalError):  # it has no room: then another time
            await journal.write(
                Statement(_COMMITS, (before, before, cycled)),
                Statement(_UNDERTAKINGS, (before, before)),
                Statement(_EVENTS, (before,)),
                Statement(_KEYS, (before,)),
                Statement("DELETE FROM losses WHERE at < ?", (before,)),
            )
        await asyncio.sleep(min(HOUR, retained))
